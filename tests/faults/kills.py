"""Runs are killed or stopped, and resume."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from tests.faults.bench import Bench
from tests.faults.fork_server import Ended, children_of, send
from tests.faults.injections import die_at_call, die_inside_a_write, signal_at_moment
from tests.faults.outcomes import EARLY, Wrong, require_one_line, require_same, require_stopped
from tests.faults.subjects import Subject

_UNTIL_WORKERS = 5.0  # longest time in seconds until a run starts its loaders


def kinds() -> dict[str, Callable[[Bench], str]]:
    """Name of a fault → function that injects it once and returns the outcome."""
    return {
        "kill -9 at a random moment": _kill,
        "SIGTERM at a random moment": lambda bench: _stop(bench, signal.SIGTERM),
        "Ctrl-C at a random moment": lambda bench: _stop(bench, signal.SIGINT),
        "two stops, going on in between": _stop_twice,
        "a second signal while the first is heeded": _second_signal,
        "SIGTERM before a finetune's first checkpoint": _stop_early,
        "kill -9 at a call that writes": _die_at_call,
        "kill -9 inside a write": _die_inside_a_write,
        "kill -9 at a call that writes a checkpoint": lambda bench: _die_at_call(bench, training=True),
        "kill -9 inside a write of a checkpoint": lambda bench: _die_inside_a_write(bench, training=True),
        "kill -9 of a loader": _kill_loader,
    }


def _kill(bench: Bench) -> str:
    subject = bench.pick()
    ended, sent = bench.start_and(send(signal.SIGKILL), subject, bench.some_time(subject))
    if _has_ended(bench, subject, ended):
        return EARLY
    if not sent or ended.code != -signal.SIGKILL:
        raise Wrong(f"code {ended.code}: {ended.output[-1500:]}")
    return bench.finish(subject, killed=True)


def _stop(bench: Bench, number: int) -> str:
    subject = bench.pick()
    return EARLY if _stopped(bench, subject, number) is None else bench.finish(subject)


def _stop_twice(bench: Bench) -> str:
    """The resumed run is stopped too."""
    subject = bench.pick(lambda subject: not subject.recipe.begins_anew)
    if _stopped(bench, subject, bench.draw((signal.SIGTERM, signal.SIGINT))) is None:
        return EARLY
    number = bench.draw((signal.SIGTERM, signal.SIGINT))
    ended = bench.start(subject.config, _at_a_moment(bench, subject, number), resume="auto")
    if not _has_ended(bench, subject, ended):
        require_stopped(ended, number, bench.advice(subject))
    return bench.finish(subject)


def _second_signal(bench: Bench) -> str:
    """The second signal arrives before the run reacts to the first, as in a long step."""
    subject = bench.pick(lambda subject: subject.moments > 0)
    number = bench.draw((signal.SIGTERM, signal.SIGINT))
    ended = bench.start(subject.config, _at_a_moment(bench, subject, number, times=2))
    if ended.code != -number or "Traceback" in ended.output:
        raise Wrong(f"second signal {number}: code {ended.code}: {ended.output[-1500:]}")
    return bench.finish(subject, killed=True)


def _stop_early(bench: Bench) -> str:
    """Stopped during tokenising, or between that and the first checkpoint."""
    subject = bench.pick(lambda subject: subject.tokenises)
    moment = bench.number(1, subject.before_checkpoint)
    ended = bench.start(subject.config, signal_at_moment(moment, signal.SIGTERM))
    require_stopped(ended, signal.SIGTERM, bench.advice(subject))
    return bench.finish(subject)


def _stopped(bench: Bench, subject: Subject, number: int) -> Ended | None:
    """A run that was stopped at a random time, or where it checks for signals; None: it had ended before."""
    if subject.moments and bench.random.random() < 0.5:
        ended = bench.start(subject.config, _at_a_moment(bench, subject, number))
    else:
        ended, _ = bench.start_and(send(number), subject, bench.some_time(subject))
    if _has_ended(bench, subject, ended):
        return None
    require_stopped(ended, number, bench.advice(subject))
    return ended


def _at_a_moment(bench: Bench, subject: Subject, number: int, times: int = 1) -> Callable[[], None]:
    return signal_at_moment(bench.number(1, subject.moments), number, times)


def _has_ended(bench: Bench, subject: Subject, ended: Ended) -> bool:
    """Whether a run reached its end nevertheless; then its result must be right."""
    if ended.code == 0:
        require_same(bench.left(), subject.reference)
    return ended.code == 0


def _die_at_call(bench: Bench, training: bool = False) -> str:
    subject = bench.pick(lambda subject: subject.trains or not training)
    number, before = bench.number(1, subject.calls), bench.draw((True, False))
    ended = bench.start(subject.config, die_at_call(number, before))
    if ended.code != -signal.SIGKILL:
        raise Wrong(f"it did not make call {number}: code {ended.code} {ended.output[-1500:]}")
    return bench.finish(subject, killed=True)


def _die_inside_a_write(bench: Bench, training: bool = False) -> str:
    subject = bench.pick(lambda subject: subject.trains or not training)
    size = bench.number(1, subject.largest - 1)
    ended = bench.start(subject.config, die_inside_a_write(size))
    if ended.code != -signal.SIGXFSZ:
        raise Wrong(f"{size} bytes: code {ended.code}: {ended.output[-1500:]}")
    return bench.finish(subject, killed=True)


def _kill_loader(bench: Bench) -> str:
    """Kill a loader, as the kernel does when memory runs out."""
    subject = bench.pick(lambda subject: subject.has_workers)
    ended, sent = bench.start_and(lambda child: _kill_one(bench, child), subject, bench.some_time(subject))
    if _has_ended(bench, subject, ended):
        return EARLY
    if not sent or "a worker has died" not in require_one_line(ended):
        raise Wrong(ended.output[-1500:])
    return bench.finish(subject)


def _kill_one(bench: Bench, child: int) -> None:
    """Kill a loader of a run as soon as one exists."""
    since = time.monotonic()
    while time.monotonic() - since < _UNTIL_WORKERS:
        loaders = children_of(child)
        if loaders or not os.path.exists(f"/proc/{child}/stat"):
            break
        time.sleep(0.001)
    with suppress(ProcessLookupError, IndexError):
        os.kill(bench.random.choice(loaders), signal.SIGKILL)
