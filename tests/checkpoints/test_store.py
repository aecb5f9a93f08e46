"""Model folders: what is saved loads again, and what does not belong together is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cogview_pl.checkpoints.store import load_image_tokenizer, load_sequence_model
from cogview_pl.errors import UserError
from cogview_pl.vocab import TextTokenizer

from .saved import save_tokenizer


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


def test_other_weights_have_another_identity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, two = save_tokenizer(tmp_path / "one"), save_tokenizer(tmp_path / "two")
    assert one.identity != two.identity


def test_a_text_tokenizer_with_more_pieces_is_refused(run: Path) -> None:
    """Its surplus pieces would be read as command tokens."""
    TextTokenizer.train(["红橙黄绿青蓝紫黑白灰"] * 3, num_pieces=400).save(run / "model" / "text.model")
    with pytest.raises(UserError, match="text pieces"):
        load_sequence_model(run)


def test_an_image_tokenizer_with_other_codes_is_refused(run: Path) -> None:
    save_tokenizer(run / "model" / "image_tokenizer", num_codes=32)
    with pytest.raises(UserError, match="16 image codes, its image tokenizer has 32"):
        load_sequence_model(run)


def test_models_of_the_other_stage_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match="kind sequence_model, needed is image_tokenizer"):
        load_image_tokenizer(run)
    with pytest.raises(UserError, match="kind image_tokenizer, needed is sequence_model"):
        load_sequence_model(run / "model" / "image_tokenizer")


@pytest.mark.parametrize("damage", [b"", b"not safetensors"])
def test_damaged_weights_are_refused(run: Path, damage: bytes) -> None:
    (run / "model" / "weights.safetensors").write_bytes(damage)
    with pytest.raises(UserError, match="damaged"):
        load_sequence_model(run)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model/"):
        load_sequence_model(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_sequence_model(tmp_path / "nowhere")
