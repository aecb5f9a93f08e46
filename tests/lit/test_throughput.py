"""What the throughput callback logs of the device's use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cogview_pl.data.bad_samples import ImageBatch
from cogview_pl.data.sequence_dataset import SequenceBatch
from cogview_pl.lit.callbacks import Throughput
from cogview_pl.lit.callbacks import throughput as module_of_callback
from cogview_pl.lit.sequence_model import SequenceModule
from tests.make_models import make_transformer


class Watch:
    """A callback of two devices that logs every second step, a clock that is set by hand, and what was logged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peak_tflops: float | None = None) -> None:
        self.now = 10.0
        monkeypatch.setattr(module_of_callback.time, "perf_counter", lambda: self.now)
        model = make_transformer(vocab_size=60, num_layers=2, hidden_size=32, num_heads=4, num_positions=9)
        self.module: Any = SequenceModule(
            model,
            slot_names=["image"],
            slot_ids=[range(40)],
            target=0,
            token_noise=0.0,
            optimizer=None,  # type: ignore[arg-type]
            build_optimizer=None,  # type: ignore[arg-type]
            generator=None,
            val_prompts=[],
        )
        long = torch.zeros(2, 9, dtype=torch.long)
        self.batch: Any = SequenceBatch(long, long, torch.ones(2, 9), long)
        self.callback = Throughput(peak_tflops)
        shares = {"rank": 0, "num_replicas": 2}
        self.trainer: Any = SimpleNamespace(
            world_size=2, distributed_sampler_kwargs=shares, log_every_n_steps=2, precision="32-true", global_step=0
        )
        self.found: dict[str, float] = {}
        self.now += 5  # set-up
        self.callback.on_train_start(self.trainer, self.module)

    def step(self, wait: float, work: float) -> dict[str, float]:
        """Metrics of a training step that waited `wait` seconds for its batch and took `work` seconds."""
        self.found = {}
        self.module.log = lambda name, value: self.found.__setitem__(name, float(value))
        self.now += wait
        self.callback.on_train_batch_start(self.trainer, self.module, self.batch, self.trainer.global_step)
        self.now += work
        self.trainer.global_step += 1
        self.callback.on_train_batch_end(self.trainer, self.module, None, self.batch, self.trainer.global_step - 1)
        return self.found


def logged(monkeypatch: pytest.MonkeyPatch, peak_tflops: float | None) -> dict[str, float]:
    """Metrics of one logging interval of two steps that took 4 seconds together."""
    watch = Watch(monkeypatch, peak_tflops)
    watch.step(0, 2)
    return watch.step(0, 2)


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


def test_rates_and_waits_of_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of nine tokens on each device and step; what came before an interval does not count in it."""
    watch = Watch(monkeypatch)
    for waits, works in (((1.0, 0.5), (2.0, 1.5)), ((0.0, 3.0), (4.0, 1.0)), ((1.0, 1.0), (1.0, 1.0))):
        assert watch.step(waits[0], works[0]) == {}
        found = watch.step(waits[1], works[1])
        seconds = sum(waits) + sum(works)
        assert found["perf/samples_per_s"] == pytest.approx(2 * 2 * 2 / seconds)
        assert found["perf/tokens_per_s"] == pytest.approx(2 * 9 * 2 * 2 / seconds)
        assert found["perf/data_wait_share"] == pytest.approx(sum(waits) / seconds)
        assert found["perf/model_tflops"] == pytest.approx(TFLOPS * 4 / seconds)


def test_a_validation_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    watch.step(1, 1)
    watch.step(1, 1)
    watch.now += 100
    watch.callback.on_validation_end(watch.trainer, watch.module)
    watch.step(1, 2)
    found = watch.step(1, 4)
    assert found["perf/samples_per_s"] == pytest.approx(2 * 2 * 2 / 8)
    assert found["perf/data_wait_share"] == pytest.approx(2 / 8)


def test_images_have_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch, peak_tflops=1.0)
    watch.batch = ImageBatch(torch.zeros(3, 3, 8, 8), [], [], [])
    watch.module = SimpleNamespace()
    watch.step(0, 1)
    assert watch.step(1, 2) == pytest.approx({"perf/samples_per_s": 3 * 2 * 2 / 4, "perf/data_wait_share": 1 / 4})
