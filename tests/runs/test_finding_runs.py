"""Folder of a new run, run that `resume` selects, and refusals before anything is written."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

import pytest
from torch.distributed import HashStore

from cogview_pl.config.choices import Verb
from cogview_pl.errors import UserError
from cogview_pl.runs import interrupted, run_folder
from cogview_pl.runs.interrupted import can_go_on, open_run
from cogview_pl.runs.lock import LOCK
from cogview_pl.runs.ranks import Processes
from cogview_pl.runs.record import RECORD
from cogview_pl.runs.run_folder import RunFolder, new_run, predecessor

from .begun import begun, everything, run

LAST = "checkpoints/last.ckpt"
EVERY_WORK = (LAST, "tokens/token_store/header.json", "token_store/header.json", "samples.jsonl", "metrics.json")


def resumed(outputs: str, resume: object) -> RunFolder:
    folder, _ = open_run(run(outputs=outputs, resume=resume), None)
    folder.unlock()
    return folder


# --- new ones


class Noon(datetime):
    """A clock that always shows the same time."""

    @classmethod
    def now(cls, tz: object = None) -> Noon:
        return cls(2026, 3, 4, 12, 0, 5)


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "datetime", Noon)
    outputs = tmp_path / "outputs"
    made = [new_run(str(outputs), "vqvae", None, None) for _ in range(3)]
    assert [str(folder.path.relative_to(outputs)) for folder in made] == [
        "vqvae/2026-03-04_12-00-05",
        "vqvae/2026-03-04_12-00-05.1",
        "vqvae/2026-03-04_12-00-05.2",
    ]
    assert all(os.listdir(folder.path) == [] for folder in made)
    monkeypatch.undo()
    path = new_run(str(outputs), "vqvae", None, None).path
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", path.name)
    assert abs((datetime.now() - datetime.strptime(path.name, "%Y-%m-%d_%H-%M-%S")).total_seconds()) < 60


def test_only_a_run_under_outputs_becomes_the_latest_one(tmp_path: Path) -> None:
    for given in (None, str(tmp_path / "mine")):
        folder = new_run(str(tmp_path / "outputs"), "vqvae", given, None)
        folder.describe(run(task="vqvae"))
        folder.finish({})
    assert (tmp_path / "mine").is_dir()
    (made,) = (path for path in (tmp_path / "outputs" / "vqvae").iterdir() if path.name != "latest")
    assert os.readlink(made.parent / "latest") == made.name


@pytest.mark.parametrize("taken", ["outputs", "outputs/vqvae"])
def test_a_place_in_which_no_folder_can_be_made_is_named(tmp_path: Path, taken: str) -> None:
    """A file is in the way, or a link leads to a missing disk."""
    outputs, place = tmp_path / "outputs", tmp_path / taken
    place.parent.mkdir(exist_ok=True)
    place.touch()
    for given in (None, str(place / "run")):
        with pytest.raises(UserError, match=rf"^run_dir={place}/\S+ cannot be made \(.*\); choose another run_dir$"):
            new_run(str(outputs), "vqvae", given, None)
    place.unlink()
    place.symlink_to("unmounted")
    with pytest.raises(UserError, match=rf"^run_dir={place}/\S+ cannot be made \(.*\); choose another run_dir$"):
        new_run(str(outputs), "vqvae", None, None)


@pytest.mark.parametrize(
    "work", [LAST, "token_store/header.json", "tokens/token_store/header.json", "samples.jsonl", "metrics.json"]
)
def test_the_work_of_an_earlier_run_is_not_written_over(tmp_path: Path, work: str) -> None:
    path = begun(tmp_path / "run" / "seed=2", work)
    with pytest.raises(UserError, match=rf"^run_dir={path} holds an earlier run \({work}\); go on with it by resume="):
        new_run("outputs", "pretrain", str(tmp_path / "run"), "seed=2")
    assert new_run("outputs", "pretrain", str(tmp_path / "run"), "seed=3").path == tmp_path / "run" / "seed=3"


def test_files_that_no_run_has_made_are_named(tmp_path: Path) -> None:
    harmless = ("job.out", "job.err", "job.log", LOCK, ".a.cogview_pl-draft")
    for name in (*harmless, "c.txt", "b.txt", "a.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"files that no run has made \(a\.txt, b\.txt, c\.txt\), which it might"):
        new_run("outputs", "pretrain", str(tmp_path), None)
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match=r"files that no run has made \(a\.txt, b\.txt, c\.txt, …\), which it might"):
        new_run("outputs", "pretrain", str(tmp_path), None)
    (tmp_path / "d").rmdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).unlink()
    assert new_run("outputs", "pretrain", str(tmp_path), None).path == tmp_path
    assert sorted(os.listdir(tmp_path)) == sorted(harmless)


# --- resumed runs


@pytest.mark.parametrize(
    ("verb", "work"),
    [
        (Verb.fit_image_tokenizer, [LAST]),
        (Verb.fit_sequence_model, [LAST, "tokens/token_store/header.json"]),
        (Verb.tokenize, ["token_store/header.json"]),
        (Verb.generate, ["samples.jsonl"]),
        (Verb.rerank, ["samples.jsonl"]),
        (Verb.magnify, ["samples.jsonl"]),
        (Verb.evaluate, []),
    ],
)
def test_what_a_verb_leaves_to_go_on_with(tmp_path: Path, verb: Verb, work: list[str]) -> None:
    for number, name in enumerate(EVERY_WORK):
        path = begun(tmp_path / str(number), name)
        assert can_go_on(path, verb.value) == (name in work)
        config = run(outputs=str(tmp_path), verb=verb, resume=str(path))
        if name in work:
            assert open_run(config, None)[0].path == path
        else:
            with pytest.raises(UserError, match=r"^resume=\S+: (task=pretrain keeps nothing|\S+ does not exist; give)"):
                open_run(config, None)


def test_the_newest_run_that_left_something_goes_on(tmp_path: Path) -> None:
    home = tmp_path / "pretrain"
    with pytest.raises(UserError, match=rf"^resume=true: no interrupted run \(with {LAST}\) under {home}; start one"):
        resumed(str(tmp_path), True)
    begun(home / "2026-01-01_00-00-00", LAST)
    begun(home / "2026-01-02_00-00-00", "tokens/token_store/header.json")
    begun(home / "2026-01-03_00-00-00", "metrics.json")  # nothing to resume
    (home / "2026-01-04_00-00-00" / "checkpoints").mkdir(parents=True)
    (home / "2026-01-04_00-00-00" / LAST).touch()  # from another program
    (home / "latest").symlink_to("2026-01-01_00-00-00")
    folder = resumed(str(tmp_path), True)
    assert folder.path == home / "2026-01-02_00-00-00"
    folder.describe(run())
    assert sorted(everything(folder.path)) == [
        RECORD,
        "tokens/token_store/header.json",
    ]  # it has not begun
    folder.finish({})
    assert os.readlink(home / "latest") == "2026-01-02_00-00-00"
    assert resumed(str(tmp_path), True).path == home / "2026-01-01_00-00-00"  # the newest one has finished
    assert resumed(str(tmp_path), str(folder.path)).path == folder.path  # but can be extended
    resumed_first = resumed(str(tmp_path), True)
    resumed_first.describe(run())
    resumed_first.finish({})
    newest = home / "2026-01-02_00-00-00"
    with pytest.raises(UserError, match=rf"or name a finished run to extend it: resume={newest} trainer\.max_steps=…$"):
        resumed(str(tmp_path), True)


def test_a_run_elsewhere_goes_on_and_does_not_become_the_latest_one(tmp_path: Path) -> None:
    path = begun(tmp_path / "elsewhere", LAST)
    (tmp_path / "pretrain").mkdir()
    folder = resumed(str(tmp_path), str(path))
    folder.describe(run())
    folder.finish({})
    assert os.listdir(tmp_path / "pretrain") == []
    begun(tmp_path / "pretrain" / "named", LAST)
    folder = resumed(str(tmp_path), str(tmp_path / "pretrain" / "named" / LAST))
    folder.describe(run())
    assert sorted(everything(folder.path)) == [RECORD, LAST]
    folder.finish({})
    assert os.readlink(tmp_path / "pretrain" / "latest") == "named"


def test_a_run_that_is_named_by_a_link_keeps_its_folder_when_the_link_moves(tmp_path: Path) -> None:
    path, latest = begun(tmp_path / "pretrain" / "named", LAST), tmp_path / "pretrain" / "latest"
    latest.symlink_to("named")
    for given in (latest, latest / LAST):
        assert resumed(str(tmp_path), str(given)).path == path


def test_what_cannot_go_on_is_named(tmp_path: Path) -> None:
    path = begun(tmp_path / "run", "metrics.json")
    with pytest.raises(UserError, match=rf"^resume={path}: {path}/{LAST} does not exist; give the folder of an"):
        resumed("outputs", str(path))
    (path / "step_4.ckpt").touch()
    for file in (path / "step_4.ckpt", tmp_path / "checkpoints" / "step_4.ckpt"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
        home = file.parent.parent
        with pytest.raises(UserError, match=rf"^resume={file}: {home} is not the folder of a run, and a run goes on"):
            resumed("outputs", str(file))
    with pytest.raises(UserError, match=rf"^resume={path}/none\.ckpt does not exist; give a checkpoint, or the folder"):
        resumed("outputs", str(path / "none.ckpt"))
    with pytest.raises(UserError, match=r"^resume=run: task=evaluate keeps nothing to go on with; start it without"):
        open_run(run(outputs="outputs", task="evaluate", verb=Verb.evaluate, resume="run"), None)
    assert sorted(everything(path)) == [RECORD, "metrics.json", "step_4.ckpt"]


def test_resume_auto_needs_a_run_folder(tmp_path: Path) -> None:
    """It starts a new run in the folder if the previous job ended without progress."""
    path = begun(tmp_path / "run")
    folder, resume = open_run(run(outputs=str(tmp_path), resume="auto", run_dir=str(path)), None)
    assert (folder.path, resume) == (path, None)


def test_the_first_process_finds_the_folder_and_the_others_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(rank: int, store: HashStore, **keys: object) -> tuple[Path, object]:
        these = Processes(rank, 2)
        these._store = store  # replaces the store over the network
        monkeypatch.setattr(interrupted, "RANKS", these)
        folder, resume = open_run(run(outputs=str(tmp_path / "outputs"), **keys), None)
        return folder.path, resume

    new = HashStore()
    first, told = (opened(rank, new, resume=None) for rank in (0, 1))
    assert first == told and first[0].parent == tmp_path / "outputs" / "pretrain" and first[1] is None
    begun(first[0], LAST)
    again = HashStore()
    assert opened(0, again, resume=str(first[0])) == opened(1, again, resume=str(first[0])) == (first[0], str(first[0]))
    failing = HashStore()
    with pytest.raises(UserError, match="keeps nothing to go on with"):
        opened(0, failing, resume="run", verb=Verb.evaluate)
    with pytest.raises(SystemExit) as ended:  # silently, because the first process has printed the reason
        opened(1, failing, resume="run", verb=Verb.evaluate)
    assert ended.value.code == 2


def test_a_process_for_another_device_takes_the_folder_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupted, "RANKS", Processes(1, 1))
    path = begun(tmp_path / "run", LAST)
    folder, resume = open_run(run(outputs="outputs", run_dir=str(path), resume="here"), None)
    assert (folder.path, resume) == (path, "here")
    assert sorted(everything(path)) == [RECORD, LAST]  # the first one holds the lock


# --- runs of other tasks


def test_the_run_of_another_task(tmp_path: Path) -> None:
    command = "run `python -m cogview_pl.run task=vqvae` first, or set image_tokenizer.path=RUN_FOLDER$"
    with pytest.raises(
        UserError, match=rf"^image_tokenizer\.path: no finished run of task=vqvae under {tmp_path}/vqvae; {command}"
    ):
        predecessor(str(tmp_path), "vqvae", "image_tokenizer.path", None)
    path = begun(tmp_path / "vqvae" / "one")
    (tmp_path / "vqvae" / "latest").symlink_to("one")
    assert predecessor(str(tmp_path), "vqvae", "image_tokenizer.path", None) == path
    assert predecessor(str(tmp_path), "vqvae", "key", str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=rf"^key={path}/x does not exist; give the folder of a run of task=vqvae$"):
        predecessor(str(tmp_path), "vqvae", "key", str(path / "x"))
