"""Stages of a chain that run at the same time, each in a process of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS

_CHAIN = "COGVIEW_PL_CHAIN"  # number of the chain's process, in the environment of its stages
_GLANCE = 0.2  # seconds between two looks at the processes
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


class StageProcess(NamedTuple):
    """A stage that has been started."""

    process: subprocess.Popen[bytes]
    folder: Path
    """Folder of its run."""
    log: Path
    """File with all that it says."""


class _Running(NamedTuple):
    name: str
    stage: StageProcess
    started: float
    later: deque[str]
    """Further stages of its lane."""


def start_process(words: Sequence[str], folder: Path, log: Path) -> StageProcess:
    """Start the command line `words`, whose run has this folder; it goes on writing a log that exists."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cogview_pl.run", *words],
            env=os.environ | {_CHAIN: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return StageProcess(process, folder, log)


def run_lanes(
    lanes: Sequence[Sequence[str]],
    start: Callable[[str], StageProcess],
    ended: Callable[[str, StageProcess, float], None],
) -> None:
    """Run the stages of each lane in order, and the lanes at the same time.

    When a stage fails or the chain is told to stop, the others save their work and end too.

    Args:
        lanes: names of stages.
        start: starts a stage.
        ended: called with a stage that has finished, and its seconds.

    Raises:
        UserError: a stage has failed; the message is its own.
        Stopped: by a signal.
    """
    waiting = [deque(lane) for lane in lanes if lane]
    running: list[_Running] = []
    try:
        while waiting or running:
            for later in waiting:
                name = later.popleft()
                running.append(_Running(name, start(name), time.perf_counter(), later))
            time.sleep(_GLANCE)
            SIGNALS.check()
            over = [one for one in running if one.stage.process.poll() is not None]
            running = [one for one in running if one not in over]
            _note(over, ended)
            for one in over:
                _require_success(one.name, one.stage)
            waiting = [one.later for one in over if one.later]
    finally:
        for one in running:  # none, unless there is an error
            one.stage.process.terminate()
        for one in running:
            one.stage.process.wait()
        _note(running, ended)


def _note(stages: Sequence[_Running], ended: Callable[[str, StageProcess, float], None]) -> None:
    """Tell which of some stages that are over have finished."""
    for one in stages:
        if one.stage.process.returncode == 0:
            ended(one.name, one.stage, time.perf_counter() - one.started)


def end_with_the_chain() -> None:
    """Have the system send SIGTERM to this process when the chain that started it dies, as from a kill (Linux)."""
    chain = os.environ.pop(_CHAIN, None)
    if chain is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != int(chain):  # it died before
        raise SystemExit(128 + signal.SIGTERM)


def _require_success(name: str, stage: StageProcess) -> None:
    if stage.process.returncode == 0:
        return
    with suppress(OSError):
        stage.folder.rmdir()  # of a command that was refused before it had a run; a folder with files stays
    said = stage.log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(said) if line.strip()), "it said nothing").removeprefix("cogview_pl: ")
    raise UserError(f"stage {name} ended with code {stage.process.returncode}: {last} (all of it: {stage.log})")
