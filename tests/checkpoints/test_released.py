"""Released files whose tensors are not those of a model: refused in one line, before anything large is made of them."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.checkpoints.naming import Naming
from cogview_pl.checkpoints.released import (
    is_released,
    is_vqvae_file,
    load_transformer,
    load_vqvae,
    released_settings,
    save_transformer,
    save_vqvae,
)
from cogview_pl.errors import UserError
from tests.make_models import make_transformer

Change = Callable[[dict[str, Tensor]], Any]
RANK = "1/mp_rank_{:02d}_model_states.pt"
LATEST = "latest_checkpointed_iteration.txt"
QKV = "transformer.layers.0.attention.query_key_value.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A released transformer of random weights."""
    model = make_transformer(vocab_size=32, num_layers=1, hidden_size=16, num_heads=2, num_positions=8)
    save_transformer(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A released tokenizer of random weights."""
    save_vqvae(build_vqvae(released_settings(8, 4, 16)), tmp_path / "tokenizer.pt")
    return tmp_path / "tokenizer.pt"


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """An error of one line with these words, and not much memory for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert message.isprintable() and all(word in message for word in words), message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


def setting(name: str, value: Tensor) -> Change:
    return lambda state: state.update({name: value})


def dropping_layers(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if ".layers." in name]:
        del state[name]


TOKENIZERS: dict[str, tuple[Change, str]] = {
    "codebook of one dimension": (setting("quantize_t.embed", torch.zeros(64)), "quantize_t.embed has the shape [64]"),
    "empty codebook": (setting("quantize_t.embed", torch.zeros(4, 0)), "quantize_t.embed has the shape [4, 0]"),
    "bias of two dimensions": (setting("enc_b.blocks.0.bias", torch.zeros(8, 1)), "enc_b.blocks.0.bias"),
    "very wide": (setting("enc_b.blocks.0.bias", torch.zeros(100_000)), "shapes of a released model"),
    "flat weight": (setting("enc_b.blocks.2.weight", torch.zeros(4)), "enc_b.blocks.2.weight) is [4]"),
    "whole numbers": (setting("enc_b.blocks.0.bias", torch.zeros(8, dtype=torch.int64)), "in int64"),
    "NaN": (setting("quantize_t.embed", torch.full((4, 16), torch.nan)), "quantize_t.embed holds numbers that are"),
    "infinite": (setting("dec.blocks.6.bias", torch.tensor([0, torch.inf, -torch.inf])), "dec.blocks.6.bias holds"),
    "name of two lines": (setting("enc_b\n\x1b[31m\ud800.weight", torch.zeros(1)), "enc_b ?[31m?.weight"),
}


@pytest.mark.parametrize("change", TOKENIZERS)
def test_tokenizers(tokenizer: Path, change: str) -> None:
    edit, words = TOKENIZERS[change]
    state = torch.load(tokenizer)
    edit(state)
    torch.save(state, tokenizer)
    with refused("image_tokenizer.path: ", str(tokenizer), words):
        load_vqvae(tokenizer)


def test_sizes_that_no_tensor_can_have() -> None:
    with refused("key: file ", "shapes of a released model"):
        Naming({}, "file", "key").require_shapes({}, lambda: torch.nn.Linear(2**31, 2**31))


TRANSFORMERS: dict[str, tuple[Change, str]] = {
    "table of one dimension": (setting("word_embeddings.weight", torch.zeros(32)), "word_embeddings.weight"),
    "no positions": (setting("transformer.position_embeddings.weight", torch.zeros(0, 16)), "position_embeddings"),
    "scalar": (setting(QKV, torch.tensor(0.0)), QKV),
    "very wide": (setting("word_embeddings.weight", torch.zeros(1, 1 << 20)), "shapes of a released model"),
    "no layers": (dropping_layers, "lacks transformer.layers.0."),
    "a layer too far": (lambda state: state.update({QKV.replace("0", "10000000"): state[QKV]}), "lacks"),
    "NaN": (setting(QKV, torch.full((48, 16), torch.nan, dtype=torch.float16)), f"{QKV} holds numbers that are not"),
    "no tensors": (lambda state: state.update({"word_embeddings.weight": [1]}), "no dictionary of weights: word_emb"),
    "numbers for names": (lambda state: state.update({0: torch.zeros(1)}), "a released model has not: 0"),
}


@pytest.mark.parametrize("change", TRANSFORMERS)
def test_transformers(folder: Path, change: str) -> None:
    edit, words = TRANSFORMERS[change]
    saved = torch.load(folder / RANK.format(0))
    edit(saved["module"])
    torch.save(saved, folder / RANK.format(0))
    with refused("init_from", str(folder), words):
        load_transformer(folder, num_heads=2)


@pytest.mark.parametrize("heads", [0, -2, 3])
def test_heads_that_do_not_divide(folder: Path, heads: int) -> None:
    with refused(f"init_from={folder}", f"num_heads={heads}"):
        load_transformer(folder, num_heads=heads)


def test_large_finite_weights_are_read(folder: Path) -> None:
    """Their sum is infinite, so that all of them are looked at."""
    saved = torch.load(folder / RANK.format(0))
    saved["module"][QKV] = torch.full((48, 16), 3e38)
    torch.save(saved, folder / RANK.format(0))
    assert load_transformer(folder, num_heads=2).blocks[0].attention.qkv.weight.max() > 2e38


def test_weights_that_are_not_finite_are_read_on_request(tokenizer: Path, folder: Path) -> None:
    state = torch.load(tokenizer)
    state["dec.blocks.6.bias"][0] = torch.nan
    torch.save(state, tokenizer)
    assert load_vqvae(tokenizer, verify=False).decoder[-1].bias.isnan().any()
    saved = torch.load(folder / RANK.format(0))
    saved["module"][QKV][0] = torch.inf
    torch.save(saved, folder / RANK.format(0))
    assert load_transformer(folder, num_heads=2, verify=False).blocks[0].attention.qkv.weight.isinf().any()


RANKS: dict[str, Change] = {
    "other shape": setting("word_embeddings.weight", torch.zeros(32, 8, dtype=torch.float16)),
    "other length": setting("word_embeddings.weight", torch.zeros(33, 16, dtype=torch.float16)),
    "other precision": lambda state: state.update({QKV: state[QKV].half()}),
    "scalar": setting(QKV, torch.tensor(0.0, dtype=torch.float16)),
    "other norm": setting("transformer.final_layernorm.bias", torch.ones(16, dtype=torch.float16)),
    "other tensors": lambda state: state.pop(QKV),
}


@pytest.mark.parametrize("change", RANKS)
def test_ranks_that_do_not_fit_together(folder: Path, change: str) -> None:
    saved = torch.load(folder / RANK.format(0))
    RANKS[change](saved["module"])
    torch.save(saved, folder / RANK.format(1))
    with refused(f"init_from={folder}", "ranks", "of different runs"):
        load_transformer(folder, num_heads=2)


@pytest.mark.parametrize("shape", [(), (16,)])
def test_ranks_of_flat_matrices(folder: Path, shape: tuple[int, ...]) -> None:
    saved = torch.load(folder / RANK.format(0))
    saved["module"]["transformer.layers.0.attention.dense.weight"] = torch.zeros(shape)
    for rank in (0, 1):
        torch.save(saved, folder / RANK.format(rank))
    with refused(f"init_from={folder}", "do not fit together in transformer.layers.0.attention.dense.weight"):
        load_transformer(folder, num_heads=2)


def test_file_that_names_the_iteration(folder: Path) -> None:
    latest = folder / LATEST
    with latest.open("wb") as stream:
        stream.truncate(1 << 40)  # without a block on the disk
    with refused(LATEST, "there is no such folder"):
        load_transformer(folder)
    for content in (b"\xff\xfe\n1", b"1/../1", b"x" * 10_000, b"", "１１".encode()):
        latest.write_bytes(content)
        with refused(LATEST, "there is no such folder"):
            load_transformer(folder)
    latest.unlink()
    os.mkfifo(latest)
    with refused(LATEST, "give the unpacked folder"):
        load_transformer(folder)


def test_names_that_no_file_can_have() -> None:
    for path in ("zero\0", "x" * 5000):
        assert not is_released(path)


def test_damage_is_found_by_every_loader(tokenizer: Path, folder: Path) -> None:
    for file in (tokenizer, folder / RANK.format(0)):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        with refused("k: ", str(file), "damaged"):
            is_vqvae_file(file, "k")
    assert is_vqvae_file(tokenizer, "k", verify=False)
    assert not is_vqvae_file(folder / RANK.format(0), "k", verify=False)
    with refused("image_tokenizer.path: ", "damaged"):
        load_vqvae(tokenizer)
    with refused("init_from: ", "damaged"):
        load_transformer(folder, num_heads=2)
    load_vqvae(tokenizer, verify=False)
    load_transformer(folder, num_heads=2, verify=False)
