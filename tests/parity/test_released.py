"""Released files open, go back as they came, and anything else is refused in one line."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cogview_pl.checkpoints.released import load_transformer, load_vqvae, save_transformer, save_vqvae
from cogview_pl.errors import UserError
from tests.make_models import make_transformer

from .conftest import Records

RANK = "mp_rank_{:02d}_model_states.pt"
LATEST = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def folder(parity: Records) -> Path:
    return parity / "sampling/checkpoint"


@pytest.fixture(scope="module")
def num_heads(parity: Records) -> int:
    return int(parity.json("sampling/meta.json")["config"]["num_attention_heads"])


def rank_file(folder: Path) -> Path:
    return folder / (folder / LATEST).read_text().strip() / RANK.format(0)


def module_of(folder: Path) -> dict[str, Tensor]:
    return torch.load(rank_file(folder), weights_only=True)["module"]


def write(folder: Path, content: Any, rank: int = 0) -> Path:
    (folder / "7").mkdir(parents=True, exist_ok=True)
    (folder / LATEST).write_text("7\n")
    torch.save(content, folder / "7" / RANK.format(rank))
    return folder


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_released_transformer_goes_back_byte_equal(folder: Path, num_heads: int, tmp_path: Path) -> None:
    save_transformer(load_transformer(folder, num_heads=num_heads), tmp_path)
    assert_same_tensors(module_of(tmp_path), module_of(folder))


def test_released_tokenizer_goes_back_byte_equal(parity: Records, tmp_path: Path) -> None:
    file = parity / "vqvae/model.pt"
    save_vqvae(load_vqvae(file), tmp_path / "out.pt")
    wanted = torch.load(file, weights_only=True)
    assert_same_tensors(torch.load(tmp_path / "out.pt", weights_only=True), wanted)


def test_our_transformer_comes_back_byte_equal(tmp_path: Path) -> None:
    ours = make_transformer(vocab_size=256, num_layers=2, hidden_size=32, num_heads=2, num_positions=40)
    save_transformer(ours, tmp_path)
    assert_same_tensors(dict(load_transformer(tmp_path, num_heads=2).state_dict()), dict(ours.state_dict()))


def test_tokenizer_with_module_prefix(parity: Records, tmp_path: Path) -> None:
    plain = torch.load(parity / "vqvae/model.pt", weights_only=True)
    torch.save({f"module.{name}": tensor for name, tensor in plain.items()}, tmp_path / "prefixed.pt")
    expected = load_vqvae(parity / "vqvae/model.pt").state_dict()
    assert_same_tensors(dict(load_vqvae(tmp_path / "prefixed.pt").state_dict()), dict(expected))


def split(name: str, tensor: Tensor, ranks: int) -> list[Tensor]:
    """What each rank of a model-parallel run holds, written from the rules of Megatron's layers."""
    if "query_key_value" in name:
        thirds = [third.chunk(ranks) for third in tensor.chunk(3)]
        return [torch.cat([third[rank] for third in thirds]) for rank in range(ranks)]
    if "word_embeddings" in name or "dense_h_to_4h" in name:
        return list(tensor.chunk(ranks))
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return list(tensor.chunk(ranks, 1))
    return [tensor] * ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_model_parallel_ranks_are_merged(folder: Path, num_heads: int, tmp_path: Path, ranks: int) -> None:
    module = module_of(folder)
    for rank in range(ranks):
        part = {name: split(name, tensor, ranks)[rank].clone() for name, tensor in module.items()}
        write(tmp_path, {"module": part}, rank)
    expected = load_transformer(folder, num_heads=num_heads).state_dict()
    assert_same_tensors(dict(load_transformer(tmp_path, num_heads=num_heads).state_dict()), dict(expected))


def test_what_training_leaves_beside_the_weights_is_read_over(folder: Path, num_heads: int, tmp_path: Path) -> None:
    states = {
        "random_rng_state": random.Random(0).getstate(),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        "global_steps": np.int64(3),
        "skipped_steps": 0,
        "csr_tensor_module_names": set(),
        "lr_scheduler": {"start_lr": 1e-4, "warmup_iter": np.float64(2.0)},
    }
    write(tmp_path, {"module": module_of(folder), **states})
    expected = load_transformer(folder, num_heads=num_heads).state_dict()
    assert_same_tensors(dict(load_transformer(tmp_path, num_heads=num_heads).state_dict()), dict(expected))


class Hostile:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_hostile_file_is_refused_and_not_run(folder: Path, num_heads: int, tmp_path: Path) -> None:
    mark = tmp_path / "was_here"
    write(tmp_path, {"module": module_of(folder), "extra": Hostile(mark)})
    with pytest.raises(UserError, match=r"refused.*system"):
        load_transformer(tmp_path, num_heads=num_heads)
    torch.save(Hostile(mark), tmp_path / "tokenizer.pt")
    with pytest.raises(UserError, match=r"refused.*system"):
        load_vqvae(tmp_path / "tokenizer.pt")
    assert not mark.exists()


def truncate(folder: Path) -> None:
    file = rank_file(folder)
    file.write_bytes(file.read_bytes()[:-1000])


def rename(folder: Path) -> None:
    module = module_of(folder)
    module["transformer.layers.0.mlp.wide.weight"] = module.pop("transformer.layers.0.mlp.dense_h_to_4h.weight")
    write(folder, {"module": module})


def drop(folder: Path) -> None:
    module = module_of(folder)
    del module["transformer.final_layernorm.bias"]
    write(folder, {"module": module})


def reshape(folder: Path) -> None:
    module = module_of(folder)
    module["transformer.final_layernorm.bias"] = torch.zeros(3)
    write(folder, {"module": module})


def empty(folder: Path) -> None:
    write(folder, {"module": {}})


def lose(folder: Path) -> None:
    rank_file(folder).unlink()


def misname(folder: Path) -> None:
    (folder / LATEST).write_text("../../etc")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "damaged"),
    "renamed key": (rename, "mlp.wide.weight"),
    "missing key": (drop, "transformer.final_layernorm.bias"),
    "wrong shape": (reshape, "final_norm.bias"),
    "no weights": (empty, "no dictionary of weights"),
    "file missing": (lose, "does not exist"),
    "wrong iteration": (misname, "latest_checkpointed_iteration.txt"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_in_one_line(folder: Path, num_heads: int, tmp_path: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    write(tmp_path, {"module": module_of(folder)})
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        load_transformer(tmp_path, num_heads=num_heads)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_number_of_heads_must_be_known(folder: Path) -> None:
    with pytest.raises(UserError, match="num_heads"):
        load_transformer(folder)
    with pytest.raises(UserError, match="num_heads=7"):
        load_transformer(folder, num_heads=7)
