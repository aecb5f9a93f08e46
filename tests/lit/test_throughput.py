"""What the throughput callback logs of the device's use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cogview_pl.data.sequences import SequenceBatch
from cogview_pl.lit.callbacks import Throughput
from cogview_pl.lit.callbacks import throughput as module_of_callback
from cogview_pl.lit.sequence_model import SequenceModule
from cogview_pl.transformer import Transformer


def logged(monkeypatch: pytest.MonkeyPatch, peak_tflops: float | None) -> dict[str, float]:
    """Metrics of one logging interval of two steps that took 4 seconds together, on two devices."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module_of_callback.time, "perf_counter", lambda: clock.now)
    model = Transformer(vocabulary_size=60, num_layers=2, width=32, num_heads=4, num_positions=9)
    module = SequenceModule(
        model,
        slot_names=["image"],
        slot_ids=[range(40)],
        target=0,
        target_noise=0.0,
        optimizer=None,  # type: ignore[arg-type]
        painter=None,
        val_prompts=[],
    )
    found: dict[str, float] = {}
    monkeypatch.setattr(module, "log", lambda name, value: found.__setitem__(name, float(value)))
    shape = 2, 9
    long = torch.zeros(shape, dtype=torch.long)
    batch = SequenceBatch(long, long, torch.ones(shape), long)
    callback = Throughput(peak_tflops)
    shares = {"rank": 0, "num_replicas": 2}
    trainer = SimpleNamespace(
        world_size=2, distributed_sampler_kwargs=shares, log_every_n_steps=2, precision="32-true", global_step=0
    )
    callback.on_train_start(trainer, module)  # type: ignore[arg-type]
    for step in (1, 2):
        trainer.global_step = step
        callback.on_train_batch_start(trainer, module, batch, step)  # type: ignore[arg-type]
        clock.now += 2
        callback.on_train_batch_end(trainer, module, None, batch, step)  # type: ignore[arg-type]
    return found


# Forward pass of a batch: two rows of 8 positions and 8 logits over 40 ids.
FORWARD = 2 * (2 * 2 * 12 * 32**2 * 8 + 2 * 2 * 32 * 8 * 9 + 2 * 32 * 8 * 40)
TFLOPS = 3 * FORWARD * 2 * 2 / 4 / 1e12  # times 3 with the backward pass, 2 devices, 2 steps; in 4 seconds


def test_utilisation_of_a_peak_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    found = logged(monkeypatch, peak_tflops=0.001)
    assert found["perf/model_tflops"] == pytest.approx(TFLOPS)
    assert found["perf/mfu"] == pytest.approx(TFLOPS / (2 * 0.001))


def test_no_utilisation_where_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    found = logged(monkeypatch, peak_tflops=None)
    assert found["perf/model_tflops"] == pytest.approx(TFLOPS)
    assert "perf/mfu" not in found
