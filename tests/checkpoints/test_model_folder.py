"""Model folders: what is saved loads again, and what is damaged or does not belong together is refused in one line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview_pl.checkpoints.adapter_folder import load_adapted
from cogview_pl.checkpoints.model_folder import folder_identity, load_image_tokenizer, load_sequence_model
from cogview_pl.errors import UserError

from ..faults.injections import flip
from ..texts import learned_text
from .saved import forge_manifest, save_tokenizer
from .test_adapter_folder import finetune


def test_a_model_moved_elsewhere_loads_whole(run: Path, tmp_path: Path) -> None:
    before = load_sequence_model(run)
    shutil.rmtree(tmp_path / "tokenizer")
    after = load_sequence_model(shutil.move(run, tmp_path / "elsewhere"))
    for name, value in before.model.state_dict().items():
        assert torch.equal(value, after.model.state_dict()[name])
    assert after.image_tokenizer.identity == before.image_tokenizer.identity
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(after.image_tokenizer.model.encode(images), before.image_tokenizer.model.encode(images))
    assert after.text.encode("红色的心形") == before.text.encode("红色的心形")


def test_other_weights_have_another_identity(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, two = save_tokenizer(tmp_path / "one"), save_tokenizer(tmp_path / "two")
    assert one.identity != two.identity
    assert folder_identity(tmp_path / "one", "key") != folder_identity(tmp_path / "two", "key")
    before = folder_identity(run, "key")
    save_tokenizer(run / "model" / "image_tokenizer")  # that of a sequence model counts as well
    assert folder_identity(run, "key") != before


def test_a_text_tokenizer_with_more_pieces_is_refused(run: Path) -> None:
    """Its surplus text tokens would be read as command tokens."""
    learned_text(["红橙黄绿青蓝紫黑白灰"] * 3, vocab_size=400).save(run / "model" / "text.model")
    with pytest.raises(UserError, match=r"text\.model is damaged"):
        load_sequence_model(run)
    forge_manifest(run / "model")
    with pytest.raises(UserError, match="text tokens"):
        load_sequence_model(run)


def test_an_image_tokenizer_of_another_run_is_refused(run: Path) -> None:
    """It decodes codes that mean something else."""
    torch.manual_seed(5)
    save_tokenizer(run / "model" / "image_tokenizer")
    with pytest.raises(UserError, match=r"image_tokenizer/manifest\.json is damaged"):
        load_sequence_model(run)


def test_an_image_tokenizer_with_other_codes_is_refused(run: Path) -> None:
    save_tokenizer(run / "model" / "image_tokenizer", codebook_size=32)
    forge_manifest(run / "model")
    with pytest.raises(UserError, match="16 image codes, its image tokenizer has 32"):
        load_sequence_model(run)


def test_models_of_the_other_stage_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match="kind sequence_model, needed is image_tokenizer"):
        load_image_tokenizer(run)
    with pytest.raises(UserError, match="kind image_tokenizer, needed is sequence_model"):
        load_sequence_model(run / "model" / "image_tokenizer")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model/"):
        load_sequence_model(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_sequence_model(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", [b"", b"not safetensors"])
def test_damaged_weights_are_refused(run: Path, damage: bytes) -> None:
    (run / "model" / "weights.safetensors").write_bytes(damage)
    for verify in (True, False):
        with pytest.raises(UserError, match="damaged"):
            load_sequence_model(run, verify=verify)


def read_run(run: Path) -> None:
    load_sequence_model(run)


def read_adapter(run: Path) -> None:
    load_adapted(run.with_name("finetune"))


FILES = {
    "model/weights.safetensors": read_run,
    "model/config.yaml": read_run,
    "model/text.model": read_run,
    "model/manifest.json": read_run,
    "model/image_tokenizer/weights.safetensors": read_run,
    "model/image_tokenizer/config.yaml": read_run,
    "model/image_tokenizer/manifest.json": read_run,
    "../finetune/adapter/adapter.safetensors": read_adapter,
    "../finetune/adapter/config.yaml": read_adapter,
    "../finetune/adapter/manifest.json": read_adapter,
    "../finetune/adapter/base.txt": read_adapter,
}


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_never_believed(run: Path, name: str) -> None:
    """100 single bits; those that change nothing that is read (white space of a list) may pass."""
    finetune(run.with_name("finetune"), run)
    file, read, random = run / name, FILES[name], Random(1)
    whole = file.read_bytes()
    passed = 0
    for _ in range(100):
        flip(file, random)
        try:
            read(run)
            passed += 1
        except UserError as error:
            assert "\n" not in str(error)
        file.write_bytes(whole)
    read(run)
    may_pass = name.endswith(("manifest.json", "base.txt"))  # they hold no values that models are made of
    assert passed == 0 or may_pass, passed


@pytest.mark.parametrize("name", ["model/weights.safetensors", "model/text.model", "model/image_tokenizer/config.yaml"])
def test_what_is_missing_is_named(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(UserError, match=r"holds no model/|is missing|does not exist"):
        load_sequence_model(run)


def test_without_a_manifest_nothing_is_believed_unless_the_user_says_so(run: Path) -> None:
    before = load_sequence_model(run)
    for file in run.rglob("manifest.json"):
        file.unlink()
    with pytest.raises(UserError, match=r"manifest\.json does not exist.*verify=false"):
        load_sequence_model(run)
    assert load_sequence_model(run, verify=False).identity == before.identity


def write(text: str) -> Callable[[str], str]:
    return lambda before: text


def replace(old: str, new: str) -> Callable[[str], str]:
    def change(before: str) -> str:
        assert old in before
        return before.replace(old, new)

    return change


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{chr(ord(name) - 1)}'] * 8)}]\n" for name in "bcdefghi"
)

HOSTILE: dict[str, tuple[Callable[[str], str], str]] = {
    "alias bomb": (write(f"kind: sequence_model\n{BOMB}"), "aliases"),
    "pipe": (write(""), "holds no model/"),
    "deep": (write("[" * 60_000), "nested too deeply"),
    "long": (write("#" * 70_000), "70,000 bytes"),
    "a list": (write("- 1\n- 2\n"), "no mapping"),
    "endless layers": (replace("num_layers: 1", "num_layers: 1000000000"), "num_layers is 1000000000"),
    "layers of another type": (replace("num_layers: 1", "num_layers: many"), "damaged"),
    "more heads": (replace("num_heads: 2", "num_heads: 3"), "damaged"),
    "width beyond all numbers": (replace("hidden_size: 16", f"hidden_size: {10**25}"), "damaged"),
    "another width": (replace("hidden_size: 16", "hidden_size: 32"), "does not fit its config.yaml"),
    "unknown key": (replace("num_heads: 2", "num_heads: 2\n  colour: red"), "colour"),
    "missing key": (replace("num_heads: 2\n", "\n"), "num_heads"),
    "no transformer": (replace("transformer:", "transformers:"), "no 'transformer'"),
    "no vocabulary": (replace("codebook_size: 16", "codebook_size: -16"), "knows -16 image codes"),
    "longer text": (replace("text_length: 8", "text_length: 9"), "needs 17 positions, the weights have 16"),
    "a layout of nothing": (replace("layout:", "layouts:"), "layout"),
    "an interpolation": (replace("num_heads: 2", "num_heads: ${oc.env:HOME}"), "damaged"),
    "python": (write("!!python/object/apply:os.system ['true']"), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_settings_are_not_believed(run: Path, name: str) -> None:
    """Whoever changes them on purpose changes the hashes as well."""
    change, words = HOSTILE[name]
    file = run / "model" / "config.yaml"
    file.write_text(change(file.read_text()))
    forge_manifest(run / "model")
    if name == "pipe":
        file.unlink()
        os.mkfifo(file)
    with pytest.raises(UserError, match=words) as error:
        load_sequence_model(run, verify=name != "pipe")
    assert "\n" not in str(error.value) and str(run) in str(error.value)


IMAGES: dict[str, tuple[Callable[[str], str], str]] = {
    "endless blocks": (replace("residual_blocks: 0", "residual_blocks: 1000000000"), "residual_blocks is 1000000000"),
    "a million wide": (replace("hidden_size: 8", "hidden_size: 1000000"), "does not fit its config.yaml"),
    "another downsampling": (replace("downsampling: 8", "downsampling: 7"), "downsampling is 7"),
    "no image size": (replace("image_size: 16", "image_size: x"), "image_size|whole number"),
    "an unknown quantizer": (replace("EMAQuantizer", "FooQuantizer"), "FooQuantizer"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_settings_of_image_tokenizers_are_not_believed(run: Path, name: str) -> None:
    change, words = IMAGES[name]
    file = run / "model" / "image_tokenizer" / "config.yaml"
    file.write_text(change(file.read_text()))
    forge_manifest(run / "model" / "image_tokenizer")
    forge_manifest(run / "model")
    with pytest.raises(UserError, match=words) as error:
        load_sequence_model(run)
    assert "\n" not in str(error.value) and "config.yaml" in str(error.value)


@pytest.mark.parametrize("part", ["", "image_tokenizer"])
@pytest.mark.parametrize("change", ["nan", "inf", "other names", "fewer", "integers"])
def test_weights_that_cannot_be_used_are_refused(run: Path, change: str, part: str) -> None:
    folder = run / "model" / part
    file = folder / "weights.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = "final_norm.weight" if not part else "encoder.0.bias"
    if change in ("nan", "inf"):
        weights[name][0] = float(change)
    elif change == "other names":
        weights["x"] = weights.pop(name)
    elif change == "fewer":
        del weights[name]
    else:
        weights[name] = weights[name].to(torch.int64)
    save_file(weights, file)
    forge_manifest(folder)
    forge_manifest(run / "model")
    with pytest.raises(UserError, match=r"not finite|does not fit") as error:
        load_sequence_model(run)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_large_finite_weights_are_none_that_are_not_finite(run: Path) -> None:
    """Their sum overflows."""
    file = run / "model" / "weights.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    weights["final_norm.weight"][:] = 3e38
    save_file(weights, file)
    forge_manifest(run / "model")
    assert load_sequence_model(run).model.final_norm.weight.max() == torch.tensor(3e38)
