"""Runs configurations in forked children: everything is imported once, so a run takes one second, not ten."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import cogview_pl.tasks.chain
import cogview_pl.tasks.evaluate
import cogview_pl.tasks.fit_features
import cogview_pl.tasks.fit_image_tokenizer
import cogview_pl.tasks.fit_sequence_model
import cogview_pl.tasks.generate
import cogview_pl.tasks.magnify
import cogview_pl.tasks.plan
import cogview_pl.tasks.rerank
import cogview_pl.tasks.tokenize  # noqa: F401
from cogview_pl.cli.messages import errors_in_one_line, report_thread_error
from cogview_pl.config.choices import Verb
from cogview_pl.config.schema import register_schemas
from cogview_pl.run import run_composed

LONGEST = 120  # seconds; a longer run counts as hanging

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER

Prepare = Callable[[], None]
"""Function that the child calls first."""


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a run."""

    code: int
    """Exit code; negative for a signal that ended the run."""
    output: str
    seconds: float


def nothing() -> None:
    """Does nothing."""


def compose(*overrides: str) -> DictConfig:
    """A configuration that is composed like on the command line; a chain composes its stages in the same way."""
    if not GlobalHydra.instance().is_initialized():
        register_schemas()
        hydra.initialize(version_base="1.3", config_path="../../conf")
    composed = hydra.compose("config", overrides=[*overrides], return_hydra_config=True)
    if composed.verb == Verb.chain:  # parses the command line
        HydraConfig.instance().set_config(composed)
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    return composed


def start(config: DictConfig, log: Path, prepare: Prepare = nothing, **keys: Any) -> int:
    """Run a configuration in a child, with other values for some keys.

    Returns the process id of the child; it is also the id of a process group with its loaders.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # like `main`
        threading.excepthook = report_thread_error
        config = OmegaConf.create(config)
        for key, value in keys.items():
            OmegaConf.update(config, key, value)
        prepare()
        try:
            with errors_in_one_line():
                run_composed(config, [])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(child: int, log: Path, since: float) -> Ended:
    """Wait for a child; a hanging child is killed, and gets code -9 and the word `hangs` in its output."""
    while time.monotonic() - since < LONGEST:
        if (ended := _ended(child, log, since)) is not None:
            return ended
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Ended(-signal.SIGKILL, f"hangs\n{log.read_text(errors='replace')}", LONGEST)


def _ended(child: int, log: Path, since: float) -> Ended | None:
    found, status = os.waitpid(child, os.WNOHANG)
    if not found:
        return None
    output = log.read_text(errors="replace") if log.exists() else ""
    return Ended(os.waitstatus_to_exitcode(status), output, time.monotonic() - since)


def run(config: DictConfig, log: Path, prepare: Prepare = nothing, **keys: Any) -> Ended:
    """Run `start` and `wait`."""
    since = time.monotonic()
    return wait(start(config, log, prepare, **keys), log, since)


def run_and(
    act: Callable[[int], object], config: DictConfig, log: Path, after: float, **keys: Any
) -> tuple[Ended, bool]:
    """Run a configuration, and call `act` after some seconds if the run has not ended.

    Returns the result of the run, and whether `act` was called. `act` gets the process id.
    """
    since = time.monotonic()
    child = start(config, log, **keys)
    while time.monotonic() - since < after:
        if (ended := _ended(child, log, since)) is not None:
            return ended, False
        time.sleep(0.001)
    with suppress(ProcessLookupError):
        act(child)
    return wait(child, log, since), True


def send(number: int) -> Callable[[int], object]:
    """Send a signal; Ctrl-C goes to all processes of the command, as from a terminal."""
    return lambda child: os.killpg(child, number) if number == signal.SIGINT else os.kill(child, number)


def children_of(process: int) -> list[int]:
    """Child processes of a process, such as the loaders of a run."""
    try:
        return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def adopt_orphans() -> None:
    """Become the parent of loaders of killed runs, because they check for their parent only every few seconds."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def end_orphans() -> None:
    """Kill all descendants."""
    while children := children_of(os.getpid()):
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
