"""Lock of a run folder, resumed runs, and signals."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cogview_pl.durable.write import replacing
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import Stopped, StopSignals
from cogview_pl.runs.interrupted import open_run
from cogview_pl.runs.lock import LOCK, RunLock
from cogview_pl.runs.record import RECORD, RunRecord
from cogview_pl.runs.run_folder import RunFolder, new_run, require_metrics

from .begun import begun, everything, run


def holder(folder: Path) -> int:
    """A process that holds the lock of a folder until it is killed; it has a forked worker."""
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
    lock = RunLock(tmp_path)  # although the worker of the killed process may still run
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_a_folder_with_a_run_in_it_is_not_written_over(tmp_path: Path) -> None:
    path = begun(tmp_path / "run")
    (path / "checkpoints").mkdir()
    assert new_run("outputs", "pretrain", str(path), None).path == path  # nothing was written there
    (path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(
        UserError, match=rf"run_dir={path} holds an earlier run \(checkpoints/last.ckpt\).*resume={path}"
    ):
        new_run("outputs", "pretrain", str(path), None)


def test_a_folder_of_somebody_else_is_never_a_run_folder(tmp_path: Path) -> None:
    """Only a record makes a folder a run folder; other files with names of a run do not."""
    home = tmp_path / "project"
    (home / "checkpoints").mkdir(parents=True)
    (home / "notes").mkdir()
    for name, text in {
        "config.yaml": "my: own", "metrics.json": "[]", "notes/.chapter1.draft": "Once", "checkpoints/last.ckpt": "x",
    }.items():  # fmt: skip
        (home / name).write_text(text)
    before = everything(home)
    for resume in (str(home), str(home / "checkpoints" / "last.ckpt")):
        with pytest.raises(UserError, match=r"is not the folder of a run"):
            open_run(run(outputs="outputs", resume=resume), None)
    with pytest.raises(
        UserError, match=r"holds files that no run has made \(checkpoints, config.yaml, metrics.json, …"
    ):
        open_run(run(outputs="outputs", resume=None, run_dir=str(home)), None)
    with pytest.raises(UserError, match=r"is not the folder of a run"):
        open_run(run(outputs="outputs", resume="auto", run_dir=str(home)), None)
    assert everything(home) == before


def test_what_a_scheduler_prints_may_be_there_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "slurm-12.out").touch()
    assert new_run("outputs", "pretrain", str(tmp_path), None).path == tmp_path


def test_drafts_of_a_killed_run_are_not_in_the_way_of_the_next(tmp_path: Path) -> None:
    draft = tmp_path / "run" / f".{RECORD}.cogview_pl-draft"  # the state after a kill at the first write
    draft.parent.mkdir()
    draft.touch()
    folder = new_run("outputs", "vqvae", str(tmp_path / "run"), None)
    folder.lock()
    assert not draft.exists()


def test_undoing_hides_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line names the first file without space. Restoring the configuration may fail too."""
    path = begun(tmp_path / "run", "samples.jsonl")
    (path / "config.yaml").write_bytes(b"\xff")
    folder = RunFolder(path, None, goes_on=True)
    folder.describe(OmegaConf.create({"task": "pretrain"}))
    folder.begin()
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        folder.undo()
    folder.undo()
    assert (path / "config.yaml").read_bytes() == b"\xff"


def test_a_link_out_of_a_run_folder_is_refused(tmp_path: Path) -> None:
    path, diary = begun(tmp_path / "run", "checkpoints/last.ckpt"), tmp_path / "diary.txt"
    diary.write_text("dear diary")
    for name in (LOCK, "config.yaml", "checkpoints/step_3.ckpt"):
        (path / name).symlink_to(diary)
        with pytest.raises(UserError, match=rf"{path / name} is a link"):
            open_run(run(outputs="outputs", resume=str(path)), None)
        (path / name).unlink()
    (path / LOCK).symlink_to(diary)
    with pytest.raises(UserError, match=rf"{path / LOCK} is a link"):
        RunLock(path)
    assert diary.read_text() == "dear diary"


def test_a_folder_in_the_place_of_latest_is_found_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "pretrain" / "latest").mkdir(parents=True)
    with pytest.raises(UserError, match=r"latest must be a link to the newest run"):
        new_run(str(tmp_path), "pretrain", None, None)


def test_resume_auto_begins_or_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run" / "seed=3"
    config = run(outputs=str(tmp_path), resume="auto", run_dir=str(tmp_path / "run"))
    folder, resume = open_run(config, job="seed=3")
    assert (folder.path, resume) == (path, None)
    folder.describe(config)
    (path / "tokens" / "token_store").mkdir(parents=True)
    (path / "tokens" / "token_store" / "header.json").touch()  # a finetune that was stopped while it tokenised
    folder.unlock()
    folder, resume = open_run(config, job="seed=3")
    assert (folder.path, resume) == (path, str(path))
    with pytest.raises(UserError, match=r"resume=auto: set run_dir"):
        open_run(run(outputs=str(tmp_path), resume="auto"), None)


def test_a_checkpoint_can_be_named(tmp_path: Path) -> None:
    begun(tmp_path, "checkpoints/last.ckpt")
    file = tmp_path / "checkpoints" / "step_4.ckpt"
    with pytest.raises(UserError, match=r"step_4\.ckpt does not exist"):
        open_run(run(outputs="outputs", resume=str(file)), None)
    file.touch()
    assert open_run(run(outputs="outputs", resume=str(file)), None)[0].path == tmp_path


def going_on(path: Path) -> RunFolder:
    folder = RunFolder(path, None, goes_on=True)
    folder.describe(run(seed=1))
    return folder


def test_a_run_that_goes_on_writes_nothing_before_it_begins(tmp_path: Path) -> None:
    path = begun(tmp_path, "checkpoints/last.ckpt", settings={"seed": 3}, inputs={"data": "aa"})
    (path / "config.yaml").write_text("before: true")
    before = everything(path)
    folder = going_on(path)
    with pytest.raises(UserError, match=r"was begun with seed=3, this run has 4"):
        folder.require_same({"seed": 4}, {}, verify=True)
    with pytest.raises(UserError, match=r"data has changed since .* was begun; .*verify=false"):
        folder.require_same({}, {"data": "bb"}, verify=True)
    folder.undo()
    assert everything(path) == before
    folder = going_on(path)
    folder.require_same({"seed": 3}, {"data": "aa", "init_from": "cc"}, verify=True)
    folder.begin()
    assert (path / "config.yaml").read_text() == "before: true"
    assert (path / "config.resumed-2.yaml").read_text().startswith("task: pretrain")
    assert RunRecord.load(path).inputs == {"data": "aa", "init_from": "cc"}
    going_on(path).require_same({}, {"data": "bb"}, verify=False)


def test_the_lock_comes_before_drafts_are_cleared_away(tmp_path: Path) -> None:
    """A second run must not delete drafts of the first one."""
    path = begun(tmp_path, "checkpoints/last.ckpt")
    child = os.fork()
    if not child:
        folder = RunFolder(path, None, goes_on=True)
        folder.lock()
        with replacing(path / "checkpoints" / "last.ckpt") as draft:
            draft.write_text("new")
            (path / "writing").touch()
            while not (path / "refused").exists():
                time.sleep(0.01)
        os._exit(0)
    while not (path / "writing").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="is in use by process"):
        RunFolder(path, None, goes_on=True).lock()
    (path / "refused").touch()
    assert os.waitpid(child, 0)[1] == 0
    assert (path / "checkpoints" / "last.ckpt").read_text() == "new"


def test_a_run_of_another_task_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = RunFolder(begun(tmp_path, "checkpoints/last.ckpt"), None, goes_on=True)
    with pytest.raises(UserError, match=r"is a run of task=pretrain, this is task=caption"):
        folder.describe(run(task="caption"))


def test_going_on_by_the_latest_link_leaves_it_in_its_place(tmp_path: Path) -> None:
    path = begun(tmp_path / "pretrain" / "2026-01-01_00-00-00", "checkpoints/last.ckpt")
    latest = tmp_path / "pretrain" / "latest"
    latest.symlink_to(path.name)
    folder, _ = open_run(run(outputs=str(tmp_path), resume=str(latest)), None)
    folder.describe(run())
    folder.finish({"val/loss": 1.0})
    folder.unlock()
    assert os.readlink(latest) == path.name and (latest / "metrics.json").is_file()


@pytest.mark.parametrize("change", [{"settings": []}, {"inputs": 5}, {"metrics": [1]}, {"task": None}])
def test_a_record_with_other_types_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    begun(tmp_path, **{key: value for key, value in change.items() if key != "task"})
    if "task" in change:
        RunRecord(None).save(tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"is damaged"):
        RunRecord.load(tmp_path)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    file = begun(tmp_path, inputs={"data": "aa"}) / RECORD
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                assert RunRecord.load(tmp_path) == RunRecord("pretrain", inputs={"data": "aa"})
            except UserError as error:
                assert "damaged" in str(error) and "\n" not in str(error)


def test_damaged_metrics_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, None)
    folder.describe(run())
    folder.finish({"eval/fid_0": 12.5})
    require_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text('{"eval/fid_0": 12.1}')
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        require_metrics(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_when_it_looks_or_wait_for_the_end_of_a_step(number: int, code: int) -> None:
    with pytest.raises(Stopped) as stopped, StopSignals() as stop:
        signal.raise_signal(number)
        stop.check()
    assert stopped.value.code == code
    with StopSignals() as stop:
        stop.deferred = True
        signal.raise_signal(number)
        stop.check()
        assert stop.asked and stop.received == number
        with pytest.raises(Stopped):
            stop.check_while_waiting()


def test_the_loss_of_the_terminal_is_a_stop_unless_nohup_ignores_it() -> None:
    with pytest.raises(Stopped) as stopped, StopSignals() as stop:
        signal.raise_signal(signal.SIGHUP)
        stop.check()
    assert stopped.value.code == 129
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            stop.check()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_inside_a_finaliser_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python prints and ignores an exception inside a finaliser, so a handler that raises would not end the run."""

    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    unraised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraised.append)
    with pytest.raises(Stopped), StopSignals() as stop:
        Finalised()
        stop.check()
    assert not unraised


def test_a_stop_is_one_whatever_a_library_makes_of_it() -> None:
    with pytest.raises(Stopped), StopSignals() as stop:
        try:
            signal.raise_signal(signal.SIGTERM)
            stop.check()
        finally:
            raise AttributeError("cleaning up after half a call")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_at_once(first: int, second: int) -> None:
    """A repeat within half a second does not count, because a terminal and a launcher may send the same signal."""
    child = os.fork()
    if not child:
        with StopSignals() as stop:
            stop.deferred = True
            signal.raise_signal(first)
            signal.raise_signal(first)
            assert stop._asked_at is not None
            stop._asked_at -= 1  # a second later
            signal.raise_signal(second)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -second


def test_a_job_that_runs_out_of_time_is_queued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(Stopped) as stopped, StopSignals() as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)  # at the time limit; the save after the warning still finishes
        stop.check()
    assert stopped.value.code == 143
    assert (tmp_path / "asked").read_text() == "requeue 12_3\n"
    command.write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    with (
        pytest.raises(UserError, match=r"scontrol requeue 12_3 failed .*no such job.*resume=auto"),
        StopSignals() as stop,
    ):
        signal.raise_signal(signal.SIGUSR1)
        stop.check()
