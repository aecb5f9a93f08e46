"""Files of weights: what the library reads of what is written here."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogview_pl.checkpoints.weights import load_weights, number_of_tensors, read_weights, require_finite, save_weights
from cogview_pl.errors import UserError

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


def test_tensors_begin_where_their_numbers_are_aligned(tmp_path: Path) -> None:
    """In the file, so that they can be used where they are mapped; names decide among numbers of one size."""
    file = tmp_path / "weights.safetensors"
    save_weights(file, WEIGHTS)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and b"\\u" not in data[:length]
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        assert (8 + length + start) % WEIGHTS[name].element_size() == 0
        assert (
            data[8 + length + start : 8 + length + end] == WEIGHTS[name].flatten().view(torch.uint8).numpy().tobytes()
        )
    order = ["codes", "doubled", "steps", "layer.weight", "nothing", '"quoted", 名', "halved", "mask"]
    assert list(header) == order


def entry(dtype: str, shape: list[int], nbytes: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}


def forged(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


DAMAGED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "header"),
    "no header": (struct.pack("<Q", 2**63), "header"),
    "cut": (forged({"a": entry("F32", [2], 8)}, bytes(7)), "a"),
    "size beyond all": (forged({"a": entry("F32", [2**63, 0], 0)}), "verflow"),
    "complex": (forged({"a": entry("C64", [1], 8)}, bytes(8)), "a is of torch.complex64"),
    "eight bits": (forged({"a": entry("F8_E4M3", [1], 1)}, bytes(1)), "a is of torch.float8_e4m3fn"),
    "four bits": (forged({"a": entry("F4", [2], 1)}, bytes(1)), "a"),
}


@pytest.mark.parametrize("title", DAMAGED)
def test_what_is_not_written_here_is_refused(title: str, tmp_path: Path) -> None:
    content, words = DAMAGED[title]
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_weights(file, finite=True)
    message = str(error.value)
    assert message.startswith(f"{file} is damaged (") and message.endswith("); copy the folder again")
    assert words in message.removeprefix(str(file)) and "\n" not in message


def test_the_number_of_tensors_is_that_of_the_header(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_weights(file, WEIGHTS)
    assert number_of_tensors(file) == len(WEIGHTS)
    file.write_bytes(file.read_bytes()[:9])
    with pytest.raises(UserError, match=r"weights\.safetensors is damaged \(.+\); copy the folder again"):
        number_of_tensors(file)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    large = {"a": torch.full((3,), 3e38), "steps": torch.tensor(2**62)}  # whose sum is infinite
    save_weights(file, large | {"b": torch.tensor([0.0, value])})
    with pytest.raises(UserError, match=r"weights\.safetensors: b holds numbers that are not finite.*verify=false"):
        read_weights(file, finite=True)
    assert read_weights(file, finite=False)["b"].isfinite().tolist() == [True, False]
    require_finite(large, file)


def test_a_model_takes_weights_in_fp32_and_stays_in_evaluation(tmp_path: Path) -> None:
    file, given = tmp_path / "weights.safetensors", torch.nn.BatchNorm1d(2)
    given.running_mean.copy_(torch.tensor([1.5, -3.0]))  # type: ignore[union-attr]
    given.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    save_weights(file, {name: x.bfloat16() if x.is_floating_point() else x for name, x in given.state_dict().items()})
    with torch.device("meta"):
        model = torch.nn.BatchNorm1d(2)
    load_weights(model, file, finite=True)
    assert not model.training
    for name, tensor in given.state_dict().items():
        assert model.state_dict()[name].dtype == tensor.dtype and torch.equal(model.state_dict()[name], tensor), name
    with pytest.raises(
        UserError, match=r"weights\.safetensors does not fit its config\.yaml or is damaged: .*size"
    ) as error:
        load_weights(torch.nn.BatchNorm1d(3), file, finite=True)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError) as error:
        load_weights(torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(20))), file, finite=True)
    assert len(str(error.value).removeprefix(f"{file} does not fit its config.yaml or is damaged: ")) == 300
    save_weights(file, {"weight": torch.tensor([torch.nan])})
    with pytest.raises(UserError, match="weight holds numbers that are not finite"):
        load_weights(torch.nn.BatchNorm1d(1), file, finite=True)
