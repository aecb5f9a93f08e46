"""Names of released files: they lead both ways, and what does not belong to a model is named as the file names it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cogview_pl.checkpoints.naming import Naming, listed, renamer
from cogview_pl.errors import UserError

TABLE = {"blocks.{}.mlp.up": "layers.{}.wide", "table": "embed.x", "head": "out"}
NAMES = Naming(TABLE, "file.pt", "some.key")


def test_names_are_translated_both_ways() -> None:
    theirs = {"layers.0.wide.weight": torch.zeros(1), "layers.12.wide.bias": torch.zeros(2), "embed.x": torch.zeros(3)}
    ours = NAMES.ours(theirs)
    assert list(ours) == ["blocks.0.mlp.up.weight", "blocks.12.mlp.up.bias", "table"]
    assert [tensor.numel() for tensor in ours.values()] == [1, 2, 3]
    back = NAMES.theirs(ours)
    assert list(back) == list(theirs) and all(back[name] is tensor for name, tensor in theirs.items())


@pytest.mark.parametrize(
    "name", ["blocks.x.mlp.up.weight", "blocks..mlp.up", "xtable", "tablex", "table.scale", "blocks.1xmlp.up", ""]
)
def test_other_names_have_no_translation(name: str) -> None:
    assert renamer(TABLE)(name) is None
    with pytest.raises(UserError, match=r"^some\.key: file\.pt holds tensors that a released model has not: "):
        NAMES.theirs({name: torch.zeros(1), "table": torch.zeros(1)})


def refusal(check: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        check()
    return str(error.value)


def test_names_that_are_missing_or_too_many() -> None:
    state = {"table.weight": torch.zeros(1), "x": torch.zeros(1)}
    assert refusal(lambda: NAMES.require_names(state, {"table.weight", "head.bias", "y"})) == (
        "some.key: file.pt lacks out.bias, y"
    )
    assert refusal(lambda: NAMES.require_names(state, {"table.weight"})).endswith("do not belong there: x")
    NAMES.require_names(state, {"table.weight", "x"})


def test_sizes_that_a_tensor_tells() -> None:
    state = {"table": torch.zeros(2, 3), "head": torch.zeros(2, 0)}
    assert NAMES.sizes(state, "table", 2) == (2, 3)
    message = refusal(lambda: NAMES.sizes(state, "table", 1))
    assert "some.key: file.pt: embed.x has the shape [2, 3], in a released model it has 1 dimensions" in message
    assert "out has the shape [2, 0]" in refusal(lambda: NAMES.sizes(state, "head", 2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 3)


SHAPES: dict[str, tuple[Tensor, str]] = {
    "transposed": (torch.zeros(2, 3), "head.weight (out.weight) is [2, 3] in float32 and not [3, 2]"),
    "whole numbers": (torch.zeros(3, 2, dtype=torch.int8), "head.weight (out.weight) is [3, 2] in int8"),
}


@pytest.mark.parametrize("change", SHAPES)
def test_shapes_of_another_model(change: str) -> None:
    tensor, words = SHAPES[change]
    state = {"head.bias": torch.zeros(3), "head.weight": tensor}
    assert words in refusal(lambda: NAMES.require_shapes(state, Model))
    NAMES.require_shapes(state | {"head.weight": torch.zeros(3, 2).half()}, Model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_numbers_that_are_not_finite(dtype: torch.dtype) -> None:
    largest = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    NAMES.require_finite({"table": largest, "head": torch.zeros(0, dtype=dtype)})  # though the sum is infinite
    for number in (torch.nan, torch.inf, -torch.inf):
        state = {"table": torch.zeros(4, dtype=dtype), "head.bias": torch.zeros(4, dtype=dtype)}
        state["head.bias"][2] = number
        message = refusal(lambda state=state: NAMES.require_finite(state))  # type: ignore[misc]
        assert "some.key: file.pt: out.bias holds numbers that are not finite" in message
    both = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    assert "embed.x holds" in refusal(lambda: NAMES.require_finite({"table": both}))


def test_many_names_are_cut() -> None:
    names = [f"n{number}" for number in range(8)]
    assert listed(names) == "n0, n1, n2, n3, n4, n5 and 2 more"
    assert listed(names[:6]) == "n0, n1, n2, n3, n4, n5"
    assert listed(names[:7], limit=2) == "n0, n1 and 5 more"
    assert listed([]) == ""
    assert listed(["x" * 81, "a\n\x1bb"]) == "x" * 80 + ", a ?b"
