"""One run to a folder, runs that go on, and what they are told by signals."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from cogview_pl.config import Verb
from cogview_pl.errors import UserError
from cogview_pl.tasks.run_folder import new_run, open_run
from cogview_pl.tasks.run_lock import LOCK, RunLock
from cogview_pl.tasks.stopping import Stopped, StopSignals


def holder(folder: Path) -> int:
    """A process that holds the lock of a folder, until it is killed, with a forked worker of its own."""
    child = os.fork()
    if not child:
        lock = RunLock(folder)  # noqa: F841, released when it is collected
        if not os.fork():
            time.sleep(20)
            os._exit(0)
        (folder / "locked").touch()
        time.sleep(20)
        os._exit(0)
    while not (folder / "locked").exists():
        time.sleep(0.01)
    return child


def test_a_folder_in_use_is_refused_until_its_process_ends(tmp_path: Path) -> None:
    child = holder(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path} is in use by process {child} on \S+, which is alive"):
        RunLock(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock = RunLock(tmp_path)  # though the worker of the killed process may still be there
    lock.release()
    assert not (tmp_path / LOCK).exists()


def run(**keys: object) -> DictConfig:
    return OmegaConf.create({"task": "pretrain", "verb": Verb.fit_sequence_model, "run_dir": None, **keys})


def test_a_folder_with_a_run_in_it_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    assert new_run("outputs", "pretrain", str(path), None).path == path  # nothing was done there
    (path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(
        UserError, match=rf"run_dir={path} holds an earlier run \(checkpoints/last.ckpt\).*resume={path}"
    ):
        new_run("outputs", "pretrain", str(path), None)


def test_resume_auto_begins_or_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run_3"
    config = run(outputs=str(tmp_path), resume="auto", run_dir=str(tmp_path / "run"))
    folder, resume = open_run(config, job=3)
    assert (folder.path, resume) == (path, None)
    (path / "tokens" / "store").mkdir(parents=True)
    (path / "tokens" / "store" / "header.json").touch()  # a finetune that was ended while it tokenised
    folder, resume = open_run(config, job=3)
    assert (folder.path, resume) == (path, str(path))
    with pytest.raises(UserError, match=r"resume=auto: set run_dir"):
        open_run(run(outputs=str(tmp_path), resume="auto"), None)


def test_a_checkpoint_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "step_4.ckpt"
    with pytest.raises(UserError, match=r"step_4\.ckpt does not exist"):
        open_run(run(outputs="outputs", resume=str(file)), None)
    file.touch()
    assert open_run(run(outputs="outputs", resume=str(file)), None)[0].path == tmp_path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_or_wait_for_the_end_of_a_step(number: int, code: int) -> None:
    with pytest.raises(Stopped) as stopped, StopSignals():
        signal.raise_signal(number)
    assert stopped.value.code == code
    with StopSignals() as stop:
        stop.deferred = True
        signal.raise_signal(number)
        assert stop.asked and stop.received == number


def test_a_stop_is_one_whatever_the_interrupted_code_makes_of_it() -> None:
    with pytest.raises(Stopped), StopSignals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise AttributeError("cleaning up after half a call")


def test_the_second_interrupt_ends_the_process_at_once() -> None:
    child = os.fork()
    if not child:
        with StopSignals() as stop:
            stop.deferred = True
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


def test_a_job_that_runs_out_of_time_is_queued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(Stopped) as stopped, StopSignals():
        signal.raise_signal(signal.SIGUSR1)
    assert stopped.value.code == 143
    assert (tmp_path / "asked").read_text() == "requeue 12_3\n"
    command.write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    with pytest.raises(UserError, match=r"scontrol requeue 12_3 failed .*no such job.*resume=auto"), StopSignals():
        signal.raise_signal(signal.SIGUSR1)
