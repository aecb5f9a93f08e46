"""The files of a released transformer: their paths, their weights, and the merge of model-parallel ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview_pl.checkpoints.naming import State, listed
from cogview_pl.checkpoints.safe_pickle.load import is_file, shown
from cogview_pl.errors import UserError

LATEST = "latest_checkpointed_iteration.txt"
RANK_FILE = "mp_rank_{:02d}_model_states.pt"

_PREFIX = "module."
_LONGEST_NAME = 100  # bytes of a sub-folder's name


def rank_files(path: Path, key: str) -> list[Path]:
    """The files of all ranks, in order; raises UserError if a folder names none."""
    if is_file(path):
        folder, first = path.parent, path
    else:
        folder = _iteration_folder(path, key)
        first = folder / RANK_FILE.format(0)
    if first.name != RANK_FILE.format(0):
        return [first]
    ranks = [first]
    while is_file(following := folder / RANK_FILE.format(len(ranks))):
        ranks.append(following)
    return ranks


def _iteration_folder(path: Path, key: str) -> Path:
    if is_file(path / RANK_FILE.format(0)):
        return path
    latest = path / LATEST
    if not is_file(latest):
        raise UserError(f"{key}={path}: no {LATEST} and no {RANK_FILE.format(0)} there; give the unpacked folder")
    try:
        with latest.open("rb") as stream:
            name = stream.read(_LONGEST_NAME).decode("utf-8", errors="replace").strip()
    except OSError as error:
        raise UserError(f"{key}: {latest} cannot be read ({error.strerror}); unpack the archive again") from error
    names = [name, "0"] if name == "release" else [name]  # the original has two loaders, one for each name
    for candidate in names:
        if re.fullmatch(r"\w+", candidate) and (path / candidate).is_dir():
            return path / candidate
    raise UserError(f"{key}: {latest} names {shown(name, 40)!r}, and there is no such folder; unpack the archive again")


def weights_of(found: Mapping[Any, object], file: Path, key: str) -> State:
    """The tensors in the file of a rank, in its entry `module` or at the top."""
    module = found.get("module", found)
    if not isinstance(module, Mapping):
        raise UserError(
            f"{key}: {file}: entry 'module' is a {type(module).__name__}, not a dictionary of weights; give a released "
            "file"
        )
    return tensors_of(module, file, key)


def tensors_of(found: Mapping[Any, object], path: str | Path, key: str) -> State:
    """A dictionary of weights, without the prefix `module.` that distributed training adds to all names."""
    strangers = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if strangers or not found:
        raise UserError(
            f"{key}: {path} is no dictionary of weights: {listed(strangers) or 'it is empty'}; give a released file"
        )
    state = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not all(name.startswith(_PREFIX) for name in state):
        return state
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}


# Dimension along which a model-parallel rank holds a slice of a tensor; it holds other tensors in full. The fused
# projection is sliced within each of its thirds.
_SLICED = {
    "word_embeddings.weight": 0,
    "mlp.dense_h_to_4h.weight": 0,
    "mlp.dense_h_to_4h.bias": 0,
    "attention.dense.weight": 1,
    "mlp.dense_4h_to_h.weight": 1,
}
_SLICED_BY_THIRDS = ("query_key_value.weight", "query_key_value.bias")


def merge_ranks(ranks: list[State], path: str | Path, key: str) -> State:
    """The full tensors of the model; raises UserError if the ranks belong to different models."""
    if len(ranks) == 1:
        return ranks[0]
    if any(set(rank) != set(ranks[0]) for rank in ranks):
        raise UserError(
            f"{key}={path}: the {len(ranks)} ranks hold different tensors; they are of different runs: unpack one again"
        )
    return {name: _merge(name, [rank[name] for rank in ranks], path, key) for name in ranks[0]}


def _merge(name: str, slices: list[Tensor], path: str | Path, key: str) -> Tensor:
    by_thirds = name.endswith(_SLICED_BY_THIRDS)
    dimension = next((dimension for suffix, dimension in _SLICED.items() if name.endswith(suffix)), None)
    first = slices[0]
    sliced_along = 0 if by_thirds else dimension
    if any((part.shape, part.dtype) != (first.shape, first.dtype) for part in slices) or (
        sliced_along is not None and sliced_along >= first.dim()
    ):
        shapes = ", ".join(str(list(part.shape)) for part in slices[:4])
        raise UserError(
            f"{key}={path}: the ranks do not fit together in {shown(name, 80)} ({shapes}); they are of different runs: "
            "unpack one again"
        )
    if by_thirds:
        thirds = zip(*(part.chunk(3) for part in slices), strict=True)
        return torch.cat([torch.cat(third) for third in thirds])
    if dimension is not None:
        return torch.cat(slices, dimension)
    if not all(torch.equal(first, other) for other in slices[1:]):
        raise UserError(
            f"{key}={path}: the ranks disagree on {shown(name, 80)}; they are of different runs: unpack one again"
        )
    return first
