"""Files of weights: what the library reads of what is written here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogview_pl.checkpoints.weights import save_weights

WEIGHTS = {
    "layer.weight": torch.randn(3, 5),
    "steps": torch.tensor(3),
    "codes": torch.arange(7),
    "nothing": torch.empty(0, 2),
    "doubled": torch.randn(2, dtype=torch.float64),
    "halved": torch.randn(3).bfloat16(),
    "mask": torch.tensor([True, False, True]),
    '"quoted", 名': torch.randn(2).half(),
}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_weights(file, WEIGHTS)
    found = load_file(file)
    assert found.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(file, "pt") as opened:
        assert opened.get_slice("layer.weight")[1:2, 2:].equal(WEIGHTS["layer.weight"][1:2, 2:])
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("names", [("layer.weight", "steps", "codes"), ()])
def test_the_bytes_are_those_of_the_library(names: tuple[str, ...], tmp_path: Path) -> None:
    weights = {name: WEIGHTS[name] for name in names}
    save_weights(tmp_path / "ours", weights)
    save_file(weights, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
