"""Values of every kind that files of weights hold, and their comparison."""

from __future__ import annotations

from typing import Any

import torch


def contents() -> dict[str, Any]:
    """Tensors of all kinds, and what programs save beside them."""
    base = torch.randn(6, 4)
    module = torch.nn.Linear(2, 3)
    return {
        "module": module.state_dict(),  # an OrderedDict with an attribute
        "parameter": module.weight,
        "transposed": base.T,
        "part": base[2:5, 1],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "long": torch.arange(5),
        "small": torch.arange(3, dtype=torch.int8),
        "bytes": torch.get_rng_state()[:7],
        "bool": torch.tensor([True, False]),
        "texts": ["Ω", "", b"\xff\x00", b""],
        "numbers": (1, -5, 2**40, True, None, 1.5),
        "shape": torch.Size([2, 3]),
        "set": {"x"},
        3: {"type": torch.float16},
    }


def assert_equal(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert type(found) is torch.Tensor and found.dtype == wanted.dtype and torch.equal(found, wanted)
        assert not found.requires_grad and found.device.type == "cpu"
    elif isinstance(wanted, dict):
        assert type(found) is dict and list(found) == list(wanted)
        for key, value in wanted.items():
            assert_equal(found[key], value)
    elif isinstance(wanted, torch.dtype):
        assert found == str(wanted)
    else:
        assert found == (sorted(wanted) if isinstance(wanted, set) else wanted)
