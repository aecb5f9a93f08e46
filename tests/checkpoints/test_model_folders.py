"""Model folders by value: settings, identities, sizes and hashes, and which of them are compared when."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from cogview_pl.checkpoints.manifest import manifest_hash
from cogview_pl.checkpoints.model_folder import (
    IMAGE_TOKENIZER,
    SEQUENCE_MODEL,
    SequenceModel,
    build_vqvae,
    folder_identity,
    kind_of,
    load_image_tokenizer,
    load_model,
    load_sequence_model,
    read_model_settings,
)
from cogview_pl.checkpoints.settings import CONFIG, read_settings, write_settings
from cogview_pl.errors import UserError
from tests.make_models import quantizer_options, transformer_settings

from .saved import TEMPLATE, VQVAE, save_tokenizer


def test_what_a_folder_says_of_its_model(run: Path) -> None:
    sizes = transformer_settings(num_layers=1, hidden_size=16, num_heads=2, num_positions=16)
    text_tokens = load_sequence_model(run).text.vocab_size
    vocabulary = {"codebook_size": 16, "text_vocab_size": text_tokens}
    rows = len(load_sequence_model(run).model.token_embedding.weight)
    wanted = {
        "kind": "sequence_model",
        "transformer": {"vocab_size": rows, **sizes},
        "template": TEMPLATE,
        "vocabulary": vocabulary,
    }
    for folder in (run, run / "model"):
        assert read_model_settings(folder, SEQUENCE_MODEL, "key") == wanted
        assert kind_of(folder, "key") == SEQUENCE_MODEL == "sequence_model"
    images = {"kind": "image_tokenizer", "image_size": 16, "vqvae": VQVAE}
    assert read_model_settings(run, IMAGE_TOKENIZER, "key", "image_tokenizer") == images
    assert kind_of(run / "model" / "image_tokenizer", "key") == IMAGE_TOKENIZER
    model = load_sequence_model(run)
    assert not model.model.training and not model.image_tokenizer.model.training
    assert model.settings == wanted and model.image_tokenizer.settings == {**VQVAE, "image_size": 16}


def test_settings_are_compared_with_their_hash_before_they_are_read(run: Path) -> None:
    file = run / "model" / CONFIG
    file.write_text(file.read_text() + "# a comment\n")
    with pytest.raises(UserError, match=r"config\.yaml is damaged.*manifest"):
        read_model_settings(run, SEQUENCE_MODEL, "key")
    assert read_model_settings(run, SEQUENCE_MODEL, "key", verify=False)["kind"] == SEQUENCE_MODEL
    with pytest.raises(
        UserError, match=r"key=.* holds a model of kind sequence_model, needed is image_tokenizer; give"
    ):
        read_model_settings(run, IMAGE_TOKENIZER, "key", verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_files_are_compared_with_their_hashes_unless_the_user_says_otherwise(run: Path, verify: bool) -> None:
    """Of the folder itself, of what is beside its weights and of its image tokenizer."""
    parts = {run / "model" / CONFIG: "#", run / "model/image_tokenizer" / CONFIG: "#"}
    parts |= {run / "model/image_tokenizer/manifest.json": " "}
    for file, addition in parts.items():
        before = file.read_text()
        file.write_text(before + addition)
        if verify:
            with pytest.raises(UserError, match=f"{file} is damaged: it is not the file that manifest"):
                load_sequence_model(run)
        else:
            assert load_sequence_model(run, verify=verify).model.num_heads == 2
        file.write_text(before)
    file = run / "model/image_tokenizer" / CONFIG
    file.write_text(file.read_text() + "#")
    if verify:
        with pytest.raises(UserError, match="is damaged: it is not the file"):
            load_image_tokenizer(run / "model/image_tokenizer")
        with pytest.raises(UserError, match="is damaged: it is not the file"):
            load_model(run / "model/image_tokenizer", IMAGE_TOKENIZER, "key", lambda found: build_vqvae(found["vqvae"]))
    else:
        assert load_image_tokenizer(run / "model/image_tokenizer", verify=False).grid == (2, 2)


def test_identities_are_hashes_of_the_weights(run: Path, tmp_path: Path) -> None:
    """Recorded in folders of codes and adapters, so they must stay what they are."""
    found = load_sequence_model(run)
    assert found.image_tokenizer.identity == hashlib.sha256(save(found.image_tokenizer.model.state_dict())).hexdigest()
    content = b"".join(
        f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes()
        for name, tensor in sorted(load_file(run / "model/weights.safetensors").items())
    )
    assert found.identity == hashlib.sha256(content).hexdigest()
    merged = SequenceModel(found.model, found.template, found.text, found.image_tokenizer, {}, merged_from="a b")
    assert merged.identity == hashlib.sha256(b"a b").hexdigest()
    model, images = run / "model", run / "model" / "image_tokenizer"
    assert folder_identity(run, "key") == f"{manifest_hash(model)} {manifest_hash(images)}"
    assert folder_identity(images, "key") == manifest_hash(images)


def test_the_grid_of_codes(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "one")
    assert tokenizer.grid == (2, 2)
    settings = read_settings(tmp_path / "one")
    write_settings(tmp_path / "one", settings | {"image_size": 47})
    assert load_image_tokenizer(tmp_path / "one", verify=False).grid == (5, 5)


def test_models_with_more_rows_than_they_need(run: Path) -> None:
    """Released tables are padded; a table with too few is refused."""
    folder = run / "model"
    settings, weights = read_settings(folder), load_file(folder / "weights.safetensors")
    table = weights["token_embedding.weight"]
    for rows in (len(table) - 1, len(table) + 3):
        changed = torch.cat([table, torch.zeros(3, 16)])[:rows]
        save_file({**weights, "token_embedding.weight": changed}, folder / "weights.safetensors")
        write_settings(folder, settings | {"transformer": settings["transformer"] | {"vocab_size": rows}})
        if rows > len(table):
            assert len(load_sequence_model(run, verify=False).model.token_embedding.weight) == rows
        else:
            with pytest.raises(UserError, match=f"needs {len(table)} tokens, the weights have {rows}"):
                load_sequence_model(run, verify=False)


@pytest.mark.parametrize("value", [-1, True, 1.5, "1", None])
def test_sizes_that_are_no_whole_numbers(run: Path, value: object) -> None:
    for folder, group, name in ((run / "model", "transformer", "num_layers"), (run, "", "image_size")):
        inner = folder if group else folder / "model" / "image_tokenizer"
        settings = read_settings(inner)
        changed = {group: settings[group] | {name: value}} if group else {name: value}
        write_settings(inner, settings | changed)
        with pytest.raises(UserError, match=rf"config\.yaml is damaged \(found {value!r} for a whole number"):
            load_sequence_model(run, verify=False)
        write_settings(inner, settings)


def test_parts_are_as_many_as_the_weights_at_most(run: Path) -> None:
    """Before any of them is built."""
    folder = run / "model"
    settings, number = read_settings(folder), len(load_file(folder / "weights.safetensors"))
    for layers, words in (
        (number, "does not fit its config"),
        (number + 1, f"num_layers is {number + 1}, and there are"),
    ):
        write_settings(folder, settings | {"transformer": settings["transformer"] | {"num_layers": layers}})
        with pytest.raises(UserError, match=words):
            load_sequence_model(run, verify=False)


@pytest.mark.parametrize("name", [CONFIG, "weights.safetensors"])
def test_half_of_a_folder_is_none(run: Path, name: str) -> None:
    (run / "model" / name).unlink()
    with pytest.raises(UserError, match=f"init_from={run} holds no model/ "):
        load_sequence_model(run)
    with pytest.raises(UserError, match=r"image_tokenizer\.path=.* does not exist; give a run folder"):
        load_image_tokenizer(run / "missing")


@pytest.mark.parametrize(("name", "value"), [("kmeans_iters", 0.0), ("commitment_weight", True)])
def test_settings_of_a_quantizer_have_their_types(tmp_path: Path, name: str, value: object) -> None:
    save_tokenizer(tmp_path)
    settings = read_settings(tmp_path)
    write_settings(tmp_path, settings | {"vqvae": VQVAE | {"quantizer": quantizer_options("ema", **{name: value})}})
    with pytest.raises(UserError, match=rf"config\.yaml is damaged \({name} is {value!r}\); copy the folder again"):
        load_image_tokenizer(tmp_path, verify=False)
