"""Names of tensors in released files and in our models, and checks that a file holds the tensors of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cogview_pl.checkpoints.safe_pickle.load import shown
from cogview_pl.errors import UserError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Naming:
    """A table of names, ours → theirs, with the path and the config key for error messages.

    The table names parts, without `.weight` and `.bias`; `{}` is the number of a layer.
    """

    table: Mapping[str, str]
    path: str | Path
    key: str

    def ours(self, state: Mapping[str, Tensor]) -> State:
        """A state with our names instead of theirs; raises UserError listing names that are not in the table."""
        return self._renamed(state, renamer({theirs: ours for ours, theirs in self.table.items()}))

    def theirs(self, state: Mapping[str, Tensor]) -> State:
        """A state with their names instead of ours; raises UserError listing names that are not in the table."""
        return self._renamed(state, renamer(self.table))

    def require_names(self, state: Mapping[str, Tensor], wanted: set[str]) -> None:
        """Raises UserError unless a state has exactly the wanted tensors; names are ours."""
        if missing := sorted(wanted - set(state)):
            raise UserError(f"{self.key}: {self.path} lacks {listed(map(self._their_name, missing))}")
        if unknown := sorted(set(state) - wanted):
            raise UserError(f"{self.key}: {self.path} holds tensors that do not belong there: {listed(unknown)}")

    def sizes(self, state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor, from which sizes of the model follow; raises UserError for another rank or a 0."""
        shape = tuple(state[name].shape)
        if len(shape) != dimensions or 0 in shape:
            raise UserError(
                f"{self.key}: {self.path}: {self._their_name(name)} has the shape {list(shape)}, in a released model "
                f"it has {dimensions} dimensions and numbers in it; give a released file"
            )
        return shape

    def require_shapes(self, state: Mapping[str, Tensor], build: Callable[[], nn.Module]) -> None:
        """Raises UserError unless all tensors have the shapes of the model that `build` makes (on the meta device)."""
        try:
            with torch.device("meta"):
                wanted = build().state_dict()
        except RuntimeError as error:  # sizes that no tensor can have
            raise UserError(
                f"{self.key}: {self.path} does not have the shapes of a released model: {shown(error)}; give a "
                "released file"
            ) from error
        for name, tensor in state.items():
            if tensor.shape != wanted[name].shape or not tensor.is_floating_point():
                raise UserError(
                    f"{self.key}: {self.path} does not have the shapes of a released model: {name} "
                    f"({self._their_name(name)}) is {list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')} "
                    f"and not {list(wanted[name].shape)} in floating point; give a released file"
                )

    def require_finite(self, state: Mapping[str, Tensor]) -> None:
        """Raises UserError for NaN or an infinite number among the weights."""
        for name, tensor in state.items():
            # The sum is cheap, but large finite numbers may overflow it.
            total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
            if not total.isfinite() and not tensor.isfinite().all():
                raise UserError(
                    f"{self.key}: {self.path}: {self._their_name(name)} holds numbers that are not finite (inf or "
                    "NaN): damaged, or saved by a run that had diverged; get the file again, or from another source"
                )

    def _their_name(self, name: str) -> str:
        return renamer(self.table)(name) or name

    def _renamed(self, state: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> State:
        renamed = {name: rename(name) for name in state}
        if unknown := [name for name, new in renamed.items() if new is None]:
            raise UserError(f"{self.key}: {self.path} holds tensors that a released model has not: {listed(unknown)}")
        return {str(renamed[name]): tensor for name, tensor in state.items()}


def renamer(table: Mapping[str, str]) -> Callable[[str], str | None]:
    """A function from the names on the left of a table to those on the right; None for other names."""
    patterns = [
        (re.compile(re.escape(source).replace(r"\{\}", r"(\d+)") + r"(\.weight|\.bias)?"), target)
        for source, target in table.items()
    ]

    def rename(name: str) -> str | None:
        for pattern, target in patterns:
            if match := pattern.fullmatch(name):
                *layer, kind = match.groups()
                return target.format(*layer) + (kind or "")
        return None

    return rename


def listed(names: Iterable[str], limit: int = 6) -> str:
    """The first names, for a message of one line."""
    names = [shown(name, 80) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
