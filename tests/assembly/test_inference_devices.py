"""Devices of tasks without training: `trainer.accelerator` and `trainer.devices`, on machines with and without GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogview_pl.assembly.devices import check_devices, device_type, inference_device
from cogview_pl.assembly.strategy import num_devices
from cogview_pl.errors import UserError
from cogview_pl.runs.ranks import RANKS

FP32, BF16, FP16 = ({"precision": name} for name in ("32-true", "bf16-mixed", "16-mixed"))


def trainer(accelerator: str, devices: object = 1) -> dict[str, Any]:
    return {"accelerator": accelerator, "devices": devices, "num_nodes": 1}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine as torch describes it: number of CUDA GPUs, and whether it has Apple's."""

    def describe(gpus: int, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return describe


@pytest.mark.parametrize(
    ("gpus", "mps", "found"),
    [
        (0, False, {"auto": "cpu", "gpu": None, "cuda": None, "mps": None, "cpu": "cpu"}),
        (2, False, {"auto": "cuda", "gpu": "cuda", "cuda": "cuda", "mps": None, "cpu": "cpu"}),
        (0, True, {"auto": "mps", "gpu": "mps", "cuda": None, "mps": "mps", "cpu": "cpu"}),
    ],
)
def test_the_best_device_that_is_meant_and_there(machine, gpus: int, mps: bool, found: dict[str, str | None]) -> None:
    machine(gpus, mps)
    for accelerator, kind in found.items():
        if kind is None:
            with pytest.raises(UserError, match=rf"trainer.accelerator={accelerator}: .* finds no such device"):
                device_type(accelerator)
        else:
            assert device_type(accelerator) == kind


def test_each_process_takes_its_gpu(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(4)
    for local, devices, wanted in ((0, 1, "cuda:0"), (1, 2, "cuda:1"), (1, [1, 3], "cuda:3")):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert RANKS.local_rank == local
        assert inference_device(trainer("auto", devices), BF16) == (wanted, torch.bfloat16)
    assert inference_device(trainer("cpu", 2), FP32) == ("cpu", torch.float32)
    machine(1)  # SLURM shows each process its own GPU alone
    assert inference_device(trainer("auto", 2), FP16) == ("cuda:0", torch.float16)


def test_more_devices_than_there_are_and_fp16_without_a_gpu(machine) -> None:
    machine(2)
    for devices in (3, [0, 2]):
        with pytest.raises(UserError, match=r"trainer.devices=.*: this machine has 2 of cuda; lower it"):
            check_devices(trainer("gpu", devices))
    check_devices(trainer("gpu", 2))
    check_devices(trainer("gpu", "auto"))
    check_devices(trainer("cpu", 64))
    with pytest.raises(UserError, match=r"precision=fp16 needs a CUDA GPU"):
        inference_device(trainer("cpu"), FP16)
    assert [num_devices(trainer(*given)) for given in (("auto", "auto"), ("cpu", "auto"), ("gpu", [1, 0]))] == [2, 1, 2]
