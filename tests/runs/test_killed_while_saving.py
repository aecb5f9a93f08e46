"""A run that is killed while a thread writes its checkpoint goes on as if it had not been."""

from __future__ import annotations

import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from .line import Line, carried_out, configured, samples, saved

VALUES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
BEFORE, KILLED_AT = 2, "step_3.ckpt"
OPTIONS = ("callbacks.checkpoint.background_mb=0",)


def dies_in(name: str) -> None:
    """Have this process killed in a call of `os.NAME` for the checkpoint of step 3, or for what follows it."""
    function = getattr(os, name)

    def call(*arguments: Any, **options: Any) -> Any:
        files = [os.readlink(f"/proc/self/fd/{one}") if isinstance(one, int) else str(one) for one in arguments]
        if any(KILLED_AT in file for file in files):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(os, name, call)


def dies_half_way() -> None:
    """Have this process killed when half of the checkpoint of step 3 is written."""
    save = torch.save

    def half(checkpoint: Any, stream: Any) -> None:
        save(checkpoint, stream)
        if KILLED_AT in stream.name:
            stream.flush()
            stream.truncate(stream.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


PLACES = {
    "written": dies_half_way,
    "synced": partial(dies_in, "fsync"),
    "renamed": partial(dies_in, "replace"),
    "linked": partial(dies_in, "link"),  # step_3.ckpt has one name
}


def killed_run(place: str) -> None:
    """A run that ends in one of `PLACES`."""
    PLACES[place]()
    config = configured(*OPTIONS, max_steps=6)
    carried_out(config, Line(config), samples(*VALUES))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_the_checkpoint_before_is_whole(run: Path, place: str) -> None:
    whole = Line(configured(*OPTIONS, max_steps=6))
    metrics = carried_out(whole.config, whole, samples(*VALUES))
    run.rename("whole")
    process = multiprocessing.get_context("spawn").Process(target=killed_run, args=(place,))  # threads forbid a fork
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert saved(run)["global_step"] == BEFORE
    assert (run / "checkpoints" / "last.ckpt").samefile(run / "checkpoints" / f"step_{BEFORE}.ckpt")
    config = configured(*OPTIONS, max_steps=6)
    config.resume = str(run)
    second = Line(config)
    assert carried_out(config, second, samples(*VALUES)) == metrics
    assert second.seen == whole.seen[BEFORE:] and torch.equal(second.layer.weight, whole.layer.weight)
    assert saved(run)["global_step"] == 6
