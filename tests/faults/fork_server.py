"""Runs configurations in forked children: everything is imported once, so that a run costs a second, not ten."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

import cogview_pl.tasks.fit_image_tokenizer
import cogview_pl.tasks.fit_sequence_model
import cogview_pl.tasks.generate
import cogview_pl.tasks.tokenize  # noqa: F401
from cogview_pl.config import register_schemas
from cogview_pl.run import run_or_give_up

LONGEST = 300  # seconds; a run that takes longer hangs


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """Exit code, negative for the signal that ended it."""
    output: str
    seconds: float


def compose(*overrides: str) -> DictConfig:
    """A configuration as the command line composes it."""
    register_schemas()
    with hydra.initialize(version_base="1.3", config_path="../../conf"):
        return hydra.compose("config", overrides=[*overrides])


def start(config: DictConfig, log: Path, prepare: Callable[[], None] = lambda: None, **keys: Any) -> int:
    """Run a configuration in a child, with some of its keys set to other values; returns the child's process id.

    `prepare` is called in the child before anything else.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as `main` does
        config = OmegaConf.create(config)
        for key, value in keys.items():
            OmegaConf.update(config, key, value)
        prepare()
        try:
            run_or_give_up(config, [])
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
    """Wait for a child; one that hangs is killed and counts as code -9 with the word `hangs` in its output."""
    while time.monotonic() - since < LONGEST:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            output = log.read_text(errors="replace") if log.exists() else ""
            return Ended(os.waitstatus_to_exitcode(status), output, time.monotonic() - since)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Ended(-signal.SIGKILL, f"hangs\n{log.read_text(errors='replace')}", LONGEST)


def run(config: DictConfig, log: Path, prepare: Callable[[], None] = lambda: None, **keys: Any) -> Ended:
    """`start` and `wait`."""
    since = time.monotonic()
    return wait(start(config, log, prepare, **keys), log, since)


def run_and_signal(config: DictConfig, log: Path, after: float, number: int, **keys: Any) -> Ended:
    """A run that gets a signal after some seconds, if it has not ended by then."""
    since = time.monotonic()
    child = start(config, log, **keys)
    while time.monotonic() - since < after:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return Ended(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), time.monotonic() - since)
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
    return wait(child, log, since)
