"""Which kernels train a sequence model, and what a run says that cannot use those it asks for."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from cogview_pl.assembly.busy_machine import warn_of_busy_cores
from cogview_pl.assembly.cpu_kernels import training_kernels
from cogview_pl.config.parts import training_options
from cogview_pl.errors import UserError
from cogview_pl.kernels.config import CPUKernels

from ..composed import composed


def _chosen(choice: CPUKernels, *overrides: str) -> CPUKernels | None:
    return training_kernels(choice, training_options(composed("task=pretrain", "trainer.accelerator=cpu", *overrides)))


def test_without_a_compiler_torch_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert _chosen(CPUKernels.auto) == CPUKernels.torch
    with pytest.raises(UserError, match=r"cpu_kernels=compiled: no C\+\+ compiler.*or use cpu_kernels=auto"):
        _chosen(CPUKernels.compiled)


@pytest.mark.parametrize(
    ("override", "reason"),
    [("precision=bf16", "precision=fp32"), ("compile=true", "compile=false"), ("strategy=fsdp", "strategy=single")],
)
def test_runs_that_cannot_use_them(override: str, reason: str) -> None:
    assert _chosen(CPUKernels.auto, override) is None
    with pytest.raises(UserError, match=f"cpu_kernels=compiled: .*set {reason}"):
        _chosen(CPUKernels.compiled, override)


@pytest.mark.parametrize(("threads", "load", "warns"), [(2, 3.0, True), (2, 0.9, False), (1, 3.0, False)])
def test_several_threads_on_busy_cores(
    threads: int, load: float, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with caplog.at_level(logging.WARNING):
        warn_of_busy_cores()
    assert ("threads=1" in caplog.text) == warns
