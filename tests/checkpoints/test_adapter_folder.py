"""Adapter folders: small, read with the base that they belong to and with no other, and never with a traceback."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogview_pl.checkpoints.adapter_folder import (
    Adapter,
    find_adapter,
    find_base,
    load_adapted,
    read_adapter_settings,
    save_adapter,
)
from cogview_pl.checkpoints.manifest import file_hash
from cogview_pl.checkpoints.model_folder import SequenceModel, load_sequence_model
from cogview_pl.checkpoints.settings import read_settings
from cogview_pl.errors import UserError
from cogview_pl.transformer.config import LoRAConfig, LoRATarget
from cogview_pl.transformer.lora import adapter_state, add_lora
from cogview_pl.transformer.model import Transformer

from .saved import TEMPLATE, forge_manifest, save_run, save_tokenizer

RANK, ALPHA = 2, 4.0
LORA = LoRAConfig(rank=RANK, alpha=ALPHA, targets=[LoRATarget.qkv, LoRATarget.down], merge=False)


def finetune(folder: Path, base: Path, *, loss: float = 1.0, seed: int = 0) -> tuple[Path, Transformer]:
    """A run folder with an adapter beside the model in `base`, and the model with the adapter as it trained."""
    start = load_adapted(base)
    model = deepcopy(start.model)
    add_lora(model, LORA)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter = Adapter(
        weights=adapter_state(model),
        lora=LORA,
        transformer=start.settings["transformer"],
        template={**start.settings["template"], "loss": {"image": loss}},
        base=str(base.resolve()),
        base_identity=start.identity,
        image_tokenizer=start.image_tokenizer.identity,
    )
    save_adapter(folder / "adapter", adapter)
    return folder, model


def logits(model: Transformer) -> Tensor:
    return model(torch.arange(8)[None]).detach()


@pytest.fixture
def adapted(run: Path, tmp_path: Path) -> Path:
    """A run folder with an adapter beside the model of `run`."""
    return finetune(tmp_path / "finetune", run)[0]


@pytest.mark.parametrize("part", ["", "adapter"])
def test_an_adapter_is_read_with_its_base(part: str, run: Path, tmp_path: Path) -> None:
    folder, trained = finetune(tmp_path / "finetune", run, loss=0.5)
    found = load_adapted(folder / part)
    base = load_sequence_model(run)
    assert (logits(found.model) - logits(trained)).abs().max() < 1e-5
    assert not torch.allclose(logits(found.model), logits(base.model), atol=1e-3)
    assert found.model.state_dict().keys() == base.model.state_dict().keys()
    assert found.settings["template"]["loss"] == {"image": 0.5}  # the layout of the finetune
    assert found.text.identity == base.text.identity


def test_a_run_with_a_whole_model_is_read_without_its_base(run: Path, tmp_path: Path) -> None:
    folder, _ = finetune(tmp_path / "finetune", run)
    shutil.copytree(run / "model", folder / "model")
    shutil.rmtree(run)
    assert find_adapter(folder) is None
    load_adapted(folder)


def test_an_adapter_may_stand_on_another(run: Path, tmp_path: Path) -> None:
    first, _ = finetune(tmp_path / "first", run)
    second, trained = finetune(tmp_path / "second", first, seed=1)
    assert (logits(load_adapted(second).model) - logits(trained)).abs().max() < 1e-5
    finetune(first, run, seed=2)  # another adapter under the second
    with pytest.raises(UserError, match=r"holds other weights than the adapter was trained with"):
        load_adapted(second)


def test_identities_follow_the_weights_and_not_the_file(run: Path, tmp_path: Path) -> None:
    one = load_sequence_model(run)
    assert load_sequence_model(shutil.copytree(run, tmp_path / "copy")).identity == one.identity
    changed = load_sequence_model(run)
    with torch.no_grad():
        changed.model.final_norm.weight[0] += 1e-6
    assert changed.identity != one.identity
    half = deepcopy(load_sequence_model(run).model).to(torch.bfloat16)
    same = [SequenceModel(m, one.template, one.text, one.image_tokenizer, {}) for m in (half, deepcopy(half).float())]
    assert same[0].identity == same[1].identity != one.identity


def move_base(run: Path, adapted: Path) -> None:
    run.rename(run.with_name("elsewhere"))


def other_base(run: Path, adapted: Path) -> None:
    images = save_tokenizer(run.with_name("tokenizer") / "model")
    torch.manual_seed(9)
    shutil.rmtree(run)
    save_run(run, images)


def other_images(run: Path, adapted: Path) -> None:
    torch.manual_seed(9)
    save_tokenizer(run / "model" / "image_tokenizer")
    forge_manifest(run / "model")


def own_base(run: Path, adapted: Path) -> None:
    replace_in(adapted / "adapter" / "base.txt", str(run), str(adapted))


def base_of_each_other(run: Path, adapted: Path) -> None:
    other = shutil.copytree(adapted, adapted.with_name("other"))
    replace_in(other / "adapter" / "base.txt", str(run), str(adapted))
    replace_in(adapted / "adapter" / "base.txt", str(run), str(other))


def cut_weights(run: Path, adapted: Path) -> None:
    file = adapted / "adapter" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def other_rank(run: Path, adapted: Path) -> None:
    replace_in(adapted / "adapter" / "config.yaml", "rank: 2", "rank: 3")
    forge_manifest(adapted / "adapter")


def other_rank_by_accident(run: Path, adapted: Path) -> None:
    replace_in(adapted / "adapter" / "config.yaml", "rank: 2", "rank: 3")


def many_layers(run: Path, adapted: Path) -> None:
    replace_in(adapted / "adapter" / "config.yaml", "num_layers: 1", "num_layers: 1000000000")
    forge_manifest(adapted / "adapter")


def no_base(run: Path, adapted: Path) -> None:
    (adapted / "adapter" / "base.txt").write_bytes(b"\xff\n")


def base_is_a_pipe(run: Path, adapted: Path) -> None:
    (adapted / "adapter" / "base.txt").unlink()
    os.mkfifo(adapted / "adapter" / "base.txt")


def not_finite(run: Path, adapted: Path) -> None:
    file = adapted / "adapter" / "adapter.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file({name: tensor.clone() for name, tensor in weights.items()}, file)
    forge_manifest(adapted / "adapter")


def no_config(run: Path, adapted: Path) -> None:
    (adapted / "adapter" / "config.yaml").unlink()


def no_yaml(run: Path, adapted: Path) -> None:
    (adapted / "adapter" / "config.yaml").write_text("a: [")
    forge_manifest(adapted / "adapter")


def key_gone(run: Path, adapted: Path) -> None:
    replace_in(adapted / "adapter" / "config.yaml", "identity:", "identify:")
    forge_manifest(adapted / "adapter")


def replace_in(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (move_base, ["run, does not exist", "base.txt"]),
        (other_base, ["holds other weights", "base.txt"]),
        (other_images, ["another image tokenizer"]),
        (own_base, ["its own base", "base.txt"]),
        (base_of_each_other, ["its own base", "base.txt"]),
        (no_base, ["base.txt", "is no path"]),
        (cut_weights, ["damaged"]),
        (other_rank, ["does not fit its config.yaml"]),
        (other_rank_by_accident, ["config.yaml is damaged", "manifest.json", "verify=false"]),
        (many_layers, ["num_layers is 1000000000"]),
        (not_finite, ["not finite"]),
        (no_config, ["config.yaml is missing"]),
        (base_is_a_pipe, ["base.txt is no path", "named pipe"]),
        (no_yaml, ["damaged"]),
        (key_gone, ["damaged", "identity"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_does_not_belong_together_is_refused(
    happens: Callable[[Path, Path], None], words: list[str], run: Path, adapted: Path
) -> None:
    happens(run, adapted)
    with pytest.raises(UserError) as error:
        load_adapted(adapted)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_base_that_has_moved_is_found_where_its_path_is_corrected(run: Path, adapted: Path) -> None:
    before = logits(load_adapted(adapted).model)
    move_base(run, adapted)
    replace_in(adapted / "adapter" / "base.txt", str(run), str(run.with_name("elsewhere")))
    assert torch.equal(logits(load_adapted(adapted).model), before)


def test_what_an_adapter_folder_holds(run: Path, adapted: Path) -> None:
    folder, base = adapted / "adapter", load_sequence_model(run)
    assert sorted(file.name for file in folder.iterdir()) == [
        *("adapter.safetensors", "base.txt", "config.yaml", "manifest.json")
    ]
    assert (folder / "base.txt").read_text() == f"{run.resolve()}\n"
    assert read_settings(folder) == {
        "kind": "adapter",
        "base_identity": base.identity,
        "image_tokenizer": base.image_tokenizer.identity,
        "lora": {"rank": RANK, "alpha": ALPHA, "targets": ["qkv", "down"], "merge": False},
        "transformer": base.settings["transformer"],
        "template": {**TEMPLATE, "loss": {"image": 1.0}},
    }
    wanted = {"transformer": base.settings["transformer"], "template": {**TEMPLATE, "loss": {"image": 1.0}}}
    assert read_adapter_settings(folder) == wanted
    found = load_adapted(adapted)
    assert found.settings == {**wanted, "vocabulary": base.settings["vocabulary"]} and not found.model.training
    merged = f"{base.identity} {file_hash(folder / 'adapter.safetensors')}"
    assert found.identity == hashlib.sha256(merged.encode()).hexdigest()


def test_weights_are_those_of_the_base_and_the_scaled_product(run: Path, adapted: Path) -> None:
    base, found = load_sequence_model(run).model.state_dict(), load_adapted(adapted).model.state_dict()
    matrices = load_file(adapted / "adapter" / "adapter.safetensors")
    assert len(matrices) == 4
    for name, tensor in base.items():
        path = name.removesuffix(".weight")
        if f"{path}.lora_a" in matrices:
            tensor = tensor + ALPHA / RANK * matrices[f"{path}.lora_b"] @ matrices[f"{path}.lora_a"]
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_what_a_path_means(run: Path, adapted: Path, tmp_path: Path) -> None:
    inner = adapted / "adapter"
    assert find_adapter(adapted) == find_adapter(str(inner)) == inner
    for path in (run, run / "model", tmp_path / "missing", inner / "base.txt"):
        assert find_adapter(path) is None
    (inner / "model").mkdir()  # of an adapter folder itself: it is an adapter all the same
    assert find_adapter(inner) == inner
    (adapted / "model").mkdir()  # beside an adapter: the run's whole model
    assert find_adapter(adapted) is None


def test_bases_are_followed_to_the_last(run: Path, adapted: Path, tmp_path: Path) -> None:
    second, _ = finetune(tmp_path / "second", adapted)
    assert find_base(adapted / "adapter", "key") == str(run.resolve())
    assert find_base(second / "adapter", "key") == str(adapted.resolve())
    run.rename(tmp_path / "moved")
    with pytest.raises(UserError) as error:
        find_base(second / "adapter", "key")
    assert str(error.value) == (
        f"key={second / 'adapter'}: the adapter's base, {run.resolve()}, does not exist; write the path of its base "
        f"model into {adapted.resolve() / 'adapter' / 'base.txt'}"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is no path (it holds '')"),
        (" \n", "is no path (it holds '')"),
        ("a\x1b[31m", "is no path (it holds 'a\\x1b[31m')"),
        ("x" * 41 + "\0", f"is no path (it holds '{'x' * 40}')"),
        ("x" * ((1 << 14) + 1), "is no path (has 16,385 bytes, at most 16,384 are read)"),
    ],
    ids=["empty", "blank", "colour", "zero", "too long"],
)
def test_what_is_no_path(adapted: Path, content: str, words: str) -> None:
    (adapted / "adapter" / "base.txt").write_text(content)
    with pytest.raises(UserError) as error:
        find_base(adapted / "adapter", "key")
    assert words in str(error.value) and "\n" not in str(error.value)
    (adapted / "adapter" / "base.txt").write_text("/" * (1 << 14))  # the root, in many letters
    assert find_base(adapted / "adapter", "key") == "/" * (1 << 14)


def test_a_base_may_be_opened_by_the_caller(run: Path, adapted: Path) -> None:
    asked: list[tuple[str, str]] = []

    def open_base(path: str, key: str) -> SequenceModel:
        asked.append((path, key))
        return load_sequence_model(path)

    found = load_adapted(adapted, "some.key", open_base)
    assert asked == [(str(run.resolve()), "base of some.key")]
    assert torch.equal(logits(found.model), logits(load_adapted(adapted).model))


@pytest.mark.parametrize("part", ["adapter/config.yaml", "../run/model/config.yaml"])
def test_hashes_are_compared_unless_the_user_says_otherwise(adapted: Path, part: str) -> None:
    before = logits(load_adapted(adapted).model)
    with (adapted / part).open("a") as stream:
        stream.write("# a comment\n")
    with pytest.raises(UserError, match=r"config\.yaml is damaged: it is not the file that manifest"):
        load_adapted(adapted)
    assert torch.equal(logits(load_adapted(adapted, verify=False).model), before)
    if part.startswith("adapter"):
        with pytest.raises(UserError, match=r"config\.yaml is damaged: it is not the file that manifest"):
            read_adapter_settings(adapted / "adapter")
        assert set(read_adapter_settings(adapted / "adapter", verify=False)) == {"transformer", "template"}


CHANGES = {
    "another kind": ("kind: adapter", "kind: sequence_model", "is damaged (it is of kind sequence_model); copy"),
    "more layers": ("num_layers: 1", "num_layers: 2", "is damaged (num_layers is 2, the base has 1); copy"),
    "rank as text": ("rank: 2", "rank: two", "is damaged (rank is 'two'); copy"),
    "wider": ("hidden_size: 16", "hidden_size: 32", "is damaged (Error(s) in loading"),
    "other targets": ("- down", "- out", "adapter.safetensors does not fit its config.yaml"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_do_not_fit(adapted: Path, change: str) -> None:
    old, new, words = CHANGES[change]
    replace_in(adapted / "adapter" / "config.yaml", old, new)
    with pytest.raises(UserError) as error:
        load_adapted(adapted, verify=False)
    assert words in str(error.value) and str(adapted / "adapter") in str(error.value)
