"""Files of model-parallel runs: which belong together, and what the slices of every tensor are put together to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogview_pl.checkpoints.ranks import LATEST, RANK_FILE, merge_ranks, rank_files, tensors_of, weights_of
from cogview_pl.errors import UserError

FILE = Path("file.pt")


def make_ranks(folder: Path, *numbers: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / RANK_FILE.format(number) for number in numbers]
    for file in files:
        file.write_bytes(b"")
    return files


@pytest.mark.parametrize("name", ["500", "release", "x" * 100])
def test_ranks_are_found_from_the_folder_its_iteration_and_the_first_file(tmp_path: Path, name: str) -> None:
    files = make_ranks(tmp_path / name, 0, 1, 2, 4)  # 4 is of another run: 3 is missing
    (tmp_path / LATEST).write_text(f"{name}\n")
    for path in (tmp_path, tmp_path / name, files[0]):
        assert rank_files(path, "key") == files[:3]
    assert rank_files(files[1], "key") == [files[1]]  # no checkpoint: whoever names it gets that one alone
    other = tmp_path / "model.pt"
    other.write_bytes(b"")
    assert rank_files(other, "key") == [other]


def test_a_release_may_lie_in_the_folder_0(tmp_path: Path) -> None:
    """The two loaders of the original differ in that; a folder `release` comes first."""
    (tmp_path / LATEST).write_text("release")
    files = make_ranks(tmp_path / "0", 0)
    assert rank_files(tmp_path, "key") == rank_files(tmp_path / "0", "key") == files
    first = make_ranks(tmp_path / "release", 0)
    assert rank_files(tmp_path, "key") == first
    (tmp_path / LATEST).write_text("1")
    with pytest.raises(UserError, match=f"key: {tmp_path / LATEST} names '1', and there is no such folder"):
        rank_files(tmp_path, "key")


def test_the_name_of_an_iteration_is_a_short_word(tmp_path: Path) -> None:
    """It is another program's: it leads nowhere else."""
    for name in ("a-b", "..", "x" * 101):
        make_ranks(tmp_path / name, 0)
        (tmp_path / LATEST).write_text(name)
        with pytest.raises(UserError, match="and there is no such folder; unpack"):
            rank_files(tmp_path, "key")


def test_a_name_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / LATEST).symlink_to("/proc/self/mem")  # its first byte gives an error whoever reads it
    with pytest.raises(UserError, match=f"key: {tmp_path / LATEST} cannot be read \\(Input/output error\\)"):
        rank_files(tmp_path, "key")


def test_a_folder_without_ranks_is_refused(tmp_path: Path) -> None:
    words = f"no {LATEST} and no mp_rank_00_model_states.pt there; give the unpacked folder"
    with pytest.raises(UserError, match=f"key={tmp_path}: {words}"):
        rank_files(tmp_path, "key")


def test_weights_lie_under_module_or_alone_and_lose_a_common_prefix() -> None:
    one, two = torch.zeros(1), torch.ones(2)
    assert weights_of({"module": {"a": one}, "b": two}, FILE, "key") == {"a": one}
    assert weights_of({"a": one, "b": two}, FILE, "key") == {"a": one, "b": two}
    assert weights_of({"module": {"module.a": one, "module.b": two}}, FILE, "key") == {"a": one, "b": two}
    assert tensors_of({"module.module.a": one}, FILE, "key") == {"module.a": one}
    assert tensors_of({"module.a": one, "b": two}, FILE, "key") == {"module.a": one, "b": two}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"module": [1]}, "entry 'module' is a list"),
        ({"module": None}, "entry 'module' is a NoneType"),
        ({"module": {}}, "it is empty"),
        ({}, "it is empty"),
        ({"a": 1, "b": torch.zeros(1), 3: "x"}, "is no dictionary of weights: a, 3; give"),
    ],
)
def test_what_holds_no_weights_is_refused(found: dict[object, object], words: str) -> None:
    with pytest.raises(UserError) as error:
        weights_of(found, FILE, "key")
    assert str(error.value).startswith("key: ") and "file.pt" in str(error.value) and words in str(error.value)


def numbers(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


WHOLE = {
    "word_embeddings.weight": numbers(6, 2),
    "transformer.position_embeddings.weight": numbers(4, 2),
    "transformer.layers.0.attention.query_key_value.weight": numbers(36, 2),
    "transformer.layers.0.attention.query_key_value.bias": numbers(36),
    "transformer.layers.0.attention.dense.weight": numbers(2, 6),
    "transformer.layers.0.attention.dense.bias": numbers(2),
    "transformer.layers.0.mlp.dense_h_to_4h.weight": numbers(6, 2),
    "transformer.layers.0.mlp.dense_h_to_4h.bias": numbers(6),
    "transformer.layers.0.mlp.dense_4h_to_h.weight": numbers(2, 6),
    "transformer.layers.0.mlp.dense_4h_to_h.bias": numbers(2),
    "transformer.layers.0.input_layernorm.weight": numbers(2),
}


def slice_of(name: str, whole: Tensor, rank: int) -> Tensor:
    """What rank 0, 1 or 2 of 3 holds: rows, columns, or the same rows of queries, keys and values."""
    if "query_key_value" in name:
        return torch.cat([part[4 * rank : 4 * rank + 4] for part in (whole[:12], whole[12:24], whole[24:])])
    if "word_embeddings" in name or "h_to_4h" in name:
        return whole[2 * rank : 2 * rank + 2]
    if name.endswith(("attention.dense.weight", "4h_to_h.weight")):
        return whole[:, 2 * rank : 2 * rank + 2]
    return whole.clone()


def ranks_of(count: int) -> list[dict[str, Tensor]]:
    return [{name: slice_of(name, whole, rank) for name, whole in WHOLE.items()} for rank in range(count)]


def test_ranks_are_merged_by_value() -> None:
    merged = merge_ranks(ranks_of(3), FILE, "key")
    assert list(merged) == list(WHOLE)
    for name, whole in WHOLE.items():
        assert torch.equal(merged[name], whole), name
    alone = ranks_of(1)[0]
    assert merge_ranks([alone], FILE, "key") is alone


QKV_BIAS = "transformer.layers.0.attention.query_key_value.bias"
DENSE = "transformer.layers.0.attention.dense.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("other", torch.zeros(1), "the 3 ranks hold different tensors"),
        (DENSE, numbers(3, 2), f"do not fit together in {DENSE} ([2, 2], [3, 2], [2, 2])"),
        (QKV_BIAS, numbers(12).half(), f"do not fit together in {QKV_BIAS} ([12], [12], [12])"),
        ("transformer.layers.0.input_layernorm.weight", numbers(2) + 1, "disagree on transformer.layers.0.input_"),
    ],
)
def test_ranks_of_different_runs_are_refused(name: str, tensor: Tensor, words: str) -> None:
    ranks = ranks_of(3)
    ranks[1][name] = tensor
    with pytest.raises(UserError) as error:
        merge_ranks(ranks, FILE, "key")
    assert str(error.value).startswith("key=file.pt: the ") and words in str(error.value)


@pytest.mark.parametrize("name", [DENSE, QKV_BIAS])
def test_scalars_for_slices_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"do not fit together in {name}"):
        merge_ranks([{name: torch.tensor(1.0)}, {name: torch.tensor(1.0)}], FILE, "key")


def test_slices_along_an_edge_that_they_lack_are_refused() -> None:
    ranks: list[dict[str, Tensor]] = [{DENSE: numbers(3)} for _ in range(5)]
    with pytest.raises(UserError) as error:
        merge_ranks(ranks, FILE, "key")
    assert "([3], [3], [3], [3]);" in str(error.value)  # of the first four
