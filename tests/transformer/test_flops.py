"""Operations of a training sequence, against a count by hand and against torch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cogview_pl.lit.callbacks.device_peaks import peak_tflops
from cogview_pl.transformer.flops import forward_flops
from cogview_pl.transformer.model import Transformer
from tests.make_models import make_transformer

BATCH, LENGTH, WIDTH, LAYERS, VOCABULARY = 2, 9, 32, 3, 60


def make() -> Transformer:
    return make_transformer(
        vocab_size=VOCABULARY,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_heads=4,
        num_positions=LENGTH,
        attention="naive",
    )


def test_against_a_count_by_hand() -> None:
    weights = torch.ones(BATCH, LENGTH)
    weights[:, 2] = 0  # carries no loss
    slots = torch.tensor([[-1, 0, 0, 0, 1, 1, 1, 1, 1]]).expand(BATCH, -1)
    found = int(forward_flops(make(), weights, slots, [range(40, 60), range(40)]))
    read = LENGTH - 1
    maps = LAYERS * (3 + 1 + 4 + 4) * WIDTH**2 * 2 * read
    pairs = sum(range(1, read + 1))  # the query at position i sees i keys
    attention = LAYERS * 2 * (2 * WIDTH) * pairs
    logits = 2 * 20 + 5 * 40  # predictions in the first slot with a loss, and in the second
    assert found == BATCH * (maps + attention + 2 * WIDTH * logits)


def test_against_the_counter_of_torch() -> None:
    model = make()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(BATCH, LENGTH - 1, dtype=torch.long))
    ours = int(forward_flops(model, torch.ones(BATCH, LENGTH), torch.zeros(BATCH, LENGTH, dtype=torch.long)))
    read = LENGTH - 1
    hidden = LAYERS * 4 * WIDTH * (read**2 - read * (read + 1) // 2)  # the counter takes pairs with later positions too
    assert counter.get_total_flops() == ours + BATCH * hidden


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989),
        ("NVIDIA H100 PCIe", "16-mixed", 756),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5),
        ("NVIDIA L40S", "bf16-mixed", 362),
        ("NVIDIA L4", "bf16-mixed", 121),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16-mixed", None),
        ("NVIDIA GeForce GTX 1080", "bf16-mixed", None),
        ("NVIDIA H200", "64-true", None),
    ],
)
def test_peak_of_a_device(name: str, precision: str, peak: float | None) -> None:
    assert peak_tflops(name, precision) == peak


def test_tensor_cores_in_fp32_only_where_torch_may_use_them() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_tflops("NVIDIA A100-SXM4-80GB", "32-true") == 156
    finally:
        torch.set_float32_matmul_precision("highest")
