"""State dicts of other programs are read; damaged or unexpected files end in one line."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cogview_pl.errors import UserError
from cogview_pl.evaluation.state_dicts import fit, read_state_dict

from ..faults.injections import flip


def weights() -> dict[str, Tensor]:
    return {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2)}


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as found:
        read_state_dict(file, "key", verify=True)
    assert "\n" not in str(found.value) and str(file) in str(found.value)
    return str(found.value)


def test_every_format_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    for form in ("zip", "old", "safetensors"):
        if form == "safetensors":
            save_file(weights(), file)
        else:
            torch.save(weights(), file, _use_new_zipfile_serialization=form == "zip")
        torch.testing.assert_close(read_state_dict(file, "key", verify=True), weights())


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    assert "does not exist" in refusal(file)
    torch.save({"state_dict": weights()}, file)
    assert "state_dict is a dict" in refusal(file)
    save_file(weights(), file)
    file.write_bytes(file.read_bytes()[:-1])
    assert "is damaged" in refusal(file)
    torch.save([torch.zeros(1)], file)
    assert "list" in refusal(file)
    torch.save({**weights(), "0.bias": torch.tensor([1.0, float("nan")])}, file)
    assert "not finite" in refusal(file)
    assert read_state_dict(file, "key", verify=False)["0.bias"].isnan().any()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_flipped_bits(old: bool, tmp_path: Path) -> None:
    """Damaged archives are refused by their checksums. Old files have none: one line, or weights of the same shapes."""
    file, random = tmp_path / "weights.pth", Random(2)
    torch.save(weights(), file, _use_new_zipfile_serialization=not old)
    whole = file.read_bytes()
    for _ in range(100):
        flip(file, random)
        try:
            found = read_state_dict(file, "key", verify=True)
            assert old or all(torch.equal(found[name], tensor) for name, tensor in weights().items())
        except UserError as error:
            assert "\n" not in str(error)
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.bias": None}, "0.bias is missing"),
        ({"1.bias": torch.ones(2)}, "1.bias is unknown"),
        ({"0.bias": torch.ones(3)}, r"0.bias has the shape \(3,\) instead of \(2,\)"),
        ({"0.bias": torch.ones(2, dtype=torch.int64)}, "0.bias holds int64"),
        ({f"x\n{i}": torch.ones(1) for i in range(9)}, "x 0 is unknown, x 1 is unknown, x 2 is unknown and 6 more"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Tensor | None], words: str) -> None:
    given = {name: tensor for name, tensor in {**weights(), **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=f"key=f does not fit a layer: {words}") as error:
        fit(nn.Sequential(nn.Linear(3, 2)), given, "a layer", Path("f"), "key")
    assert not re.search("\n", str(error.value))


def test_half_precision_and_missing_counters() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm1d(2))
    given = {f"0.{name}": torch.rand(2).half() for name in ("weight", "bias", "running_mean", "running_var")}
    fit(model, given, "a layer", Path("f"), "key")
    assert model[0].weight.dtype == torch.float32 and not model.training
    torch.testing.assert_close(model[0].running_var, given["0.running_var"].float())
