"""Files that a run writes into its folder from beginning to end, and removes when it is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from omegaconf import OmegaConf

from cogview_pl.errors import UserError
from cogview_pl.runs.history import newest_config, next_config, read_newest_config
from cogview_pl.runs.lock import LOCK
from cogview_pl.runs.ranks import Processes
from cogview_pl.runs.record import RECORD, RunRecord, is_run
from cogview_pl.runs.run_folder import RunFolder, require_metrics

from .begun import begun, everything, run

CONFIG = "config.yaml"


def test_a_run_marks_its_folder_and_leaves_configuration_metrics_and_the_latest_link(tmp_path: Path) -> None:
    path, link = tmp_path / "pretrain" / "new", tmp_path / "pretrain" / "latest"
    folder = RunFolder(path, link)
    assert folder.writes and folder / "a.txt" == path / "a.txt" and os.listdir(path) == []
    folder.lock()
    config = OmegaConf.create({"task": "pretrain", "hidden_size": 8, "height": "${hidden_size}"})
    folder.describe(config)
    assert sorted(os.listdir(path)) == [RECORD, LOCK, CONFIG]
    assert (path / CONFIG).read_text() == "task: pretrain\nhidden_size: 8\nheight: 8\n"  # without references
    assert replace(RunRecord.load(path), configurations={}) == RunRecord("pretrain") and not link.is_symlink()
    folder.require_same({"seed": 1}, {"data": "aa"}, verify=True)
    folder.finish({"val/loss": 0.5, "a note": "图"})
    folder.unlock()
    assert (path / "metrics.json").read_text(encoding="utf-8") == '{\n  "a note": "图",\n  "val/loss": 0.5\n}\n'
    digest = xxhash.xxh3_128_hexdigest((path / "metrics.json").read_bytes())
    assert replace(RunRecord.load(path), configurations={}) == RunRecord(
        "pretrain", {"seed": 1}, {"data": "aa"}, digest
    )
    assert os.readlink(link) == "new" and sorted(os.listdir(tmp_path / "pretrain")) == ["latest", "new"]
    (tmp_path / "pretrain" / f".latest.{os.getpid()}").symlink_to("left by a kill")
    other = RunFolder(tmp_path / "elsewhere", link)
    other.describe(run())
    other.finish({})
    assert os.readlink(link) == "../elsewhere"  # a relative link survives when the folder is moved
    assert sorted(os.listdir(tmp_path / "pretrain")) == ["latest", "new"]


def test_only_a_run_that_went_to_its_end_in_earnest_becomes_the_latest_one(tmp_path: Path) -> None:
    """Not a trial (`fast_dev_run`), and not a run that is refused or interrupted."""
    link = tmp_path / "pretrain" / "latest"
    ends: dict[str, tuple[dict[str, object], bool]] = {
        "first": ({}, True),
        "trial": ({"trainer": {"fast_dev_run": True}}, True),
        "of three steps": ({"trainer": {"fast_dev_run": 3}}, True),
        "interrupted": ({}, False),
        "second": ({"trainer": {"fast_dev_run": False}}, True),
    }
    for name, (settings, finishes) in ends.items():
        folder = RunFolder(tmp_path / "pretrain" / name, link)
        folder.describe(run(**settings))
        if finishes:
            folder.finish({})
        else:
            folder.undo()
        folder.unlock()
        assert os.readlink(link) == ("second" if name == "second" else "first")


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", None, Processes(1, 2))
    folder.lock()
    folder.describe(run())
    folder.require_same({"seed": 1}, {}, verify=True)
    folder.begin()
    folder.finish({"val/loss": 1.0})
    folder.unlock()
    folder.undo()
    assert os.listdir(tmp_path) == [] and not folder.writes
    path = begun(tmp_path / "run", CONFIG)
    before = everything(path)
    folder.undo()
    assert everything(path) == before


def test_a_lock_is_let_go_where_writing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    folder = RunFolder(path, None)
    os.mkfifo(path / "pipe")
    with pytest.raises(UserError, match="pipe is neither a file nor a folder"):
        folder.lock()
    assert os.listdir(path) == ["pipe"]
    folder.unlock()  # has no effect
    (path / "pipe").unlink()
    folder.lock()
    assert os.listdir(path) == [LOCK]
    folder.unlock()
    assert os.listdir(path) == []


# --- undo


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "pretrain" / "new"
    folder = RunFolder(path, None)
    folder.lock()
    folder.describe(run())
    folder.undo()
    assert not path.exists() and path.parent.is_dir()
    folder = RunFolder(path, None)  # refused before it is described
    folder.undo()
    assert not path.exists()


def test_a_refused_run_leaves_what_it_has_made(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, None)
    folder.describe(run())
    (tmp_path / "samples.jsonl").touch()
    folder.undo()
    assert sorted(os.listdir(tmp_path)) == [RECORD, CONFIG, "samples.jsonl"]


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_refused_run_puts_back_the_configuration_that_was_there_first(tmp_path: Path, goes_on: bool) -> None:
    """The earlier files are restored, although the run has written its own twice."""
    path = begun(tmp_path / "run")
    (path / CONFIG).write_text("before: true\n")
    before = everything(path)
    folder = RunFolder(path, None, goes_on=goes_on)
    folder.describe(run())
    folder.begin()
    folder.begin()
    written = path / ("config.resumed-2.yaml" if goes_on else CONFIG)
    assert written.read_text().startswith("task: pretrain")
    folder.undo()
    assert everything(path) == before


def test_a_part_of_a_run_with_progress_keeps_its_configuration(tmp_path: Path) -> None:
    """The next part is resumed from it, also after an error."""
    path = begun(tmp_path / "run", "checkpoints/last.ckpt")
    for part in (2, 3):
        folder = RunFolder(path, None, goes_on=True)
        folder.describe(run(part=part), words="# Resumed\n")
        folder.begin()
        os.utime(path / "checkpoints" / "last.ckpt", ns=(part, part))
        folder.undo()
    assert (path / "config.resumed-2.yaml").read_text().startswith("# Resumed\ntask: pretrain")
    assert newest_config(path) == path / "config.resumed-3.yaml"
    hashes = RunRecord.load(path).configurations
    assert list(hashes) == ["config.resumed-2.yaml", "config.resumed-3.yaml"]
    assert "part: 3" in read_newest_config(path, hashes) and next_config(path) == path / "config.resumed-4.yaml"
    (path / "config.resumed-3.yaml").write_text("part: 4")
    with pytest.raises(UserError, match=rf"^resume: {path}/config\.resumed-3\.yaml is not what the run wrote; copy"):
        read_newest_config(path, hashes)
    assert read_newest_config(path, {}) == "part: 4"
    (path / "config.resumed-3.yaml").unlink()  # as after a kill right before it was written
    assert "part: 2" in read_newest_config(path, hashes)


def test_a_run_that_goes_on_is_never_taken_away(tmp_path: Path) -> None:
    path = begun(tmp_path / "run")
    before = everything(path)
    folder = RunFolder(path, None, goes_on=True)
    folder.lock()
    folder.describe(run())
    folder.undo()
    folder.unlock()
    assert everything(path) == before


# --- records and metrics


def test_settings_are_compared_as_far_as_they_were_noted(tmp_path: Path) -> None:
    record = RunRecord("pretrain", {"seed": 1, "hidden_size": 8}, {"data": "aa"})
    record.require_same(tmp_path, {"seed": 1, "later": 2}, {"data": "aa", "init_from": "bb"}, verify=True)
    size = rf"^resume: {tmp_path} was begun with hidden_size=8, this run has 9; go on with hidden_size=8, or set "
    with pytest.raises(UserError, match=size):
        record.require_same(tmp_path, {"seed": 1, "hidden_size": 9}, {}, verify=True)
    with pytest.raises(UserError, match=rf"^resume: data has changed since {tmp_path} was begun; restore it"):
        record.require_same(tmp_path, {}, {"init_from": "bb", "data": "cc"}, verify=True)
    record.require_same(tmp_path, {"seed": 1, "hidden_size": 9}, {"data": "cc"}, verify=False)
    record.settings["optimizer.optimizer._target_"] = "torch.optim.SGD"
    for verify in (True, False):  # the state of one optimizer is of no use to another
        with pytest.raises(UserError, match=rf"has torch\.optim\.Adam; go on with .*SGD, or start anew .*={tmp_path}$"):
            record.require_same(tmp_path, {"optimizer.optimizer._target_": "torch.optim.Adam"}, {}, verify=verify)
    folder = RunFolder(tmp_path, None)  # a new run is compared with nothing
    folder.describe(run())
    folder.require_same({"seed": 1}, {"data": "aa"}, verify=True)
    folder.require_same({"seed": 2}, {"data": "bb"}, verify=True)
    folder.begin()
    assert replace(RunRecord.load(tmp_path), configurations={}) == RunRecord("pretrain", {"seed": 2}, {"data": "bb"})


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path} is not the folder of a run: it has no \.cogview_pl\.json; give"):
        RunRecord.load(tmp_path)
    record = RunRecord("宣传", {"loss": {"text": 0.5}, "layers": [1, 2]}, {"data": "aa"}, "bb")
    record.save(tmp_path)
    assert is_run(tmp_path) and RunRecord.load(tmp_path) == record
    text = (tmp_path / RECORD).read_text(encoding="utf-8")
    assert "宣传" in text and text.endswith("}\n")
    values = json.loads(text)
    (tmp_path / RECORD).write_text(json.dumps(dict(reversed(values.items())), indent=4))
    assert RunRecord.load(tmp_path) == record  # spaces and order do not matter


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ("[1]", "'str' object"),
        ("5", "'int' object"),
        ('{"task": "pretrain"}', "'crc32'"),
        ('{"task": "pretrain", "crc32": 3}', "its checksum is wrong"),
        ('{"other": 1, "crc32": 352797779}', "unexpected keyword argument 'other'"),
        ("[" * 100_000, "recursion"),
        (" " * (1 << 20) + "{}", "has 1,048,578 bytes, at most 1,048,576 are read"),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}/{RECORD} is damaged \(.*{words}.*; start the run anew") as error:
        RunRecord.load(tmp_path)
    assert "\n" not in str(error.value)


def test_only_the_metrics_of_finished_runs_are_judged(tmp_path: Path) -> None:
    require_metrics(tmp_path / "none")
    (tmp_path / "metrics.json").write_text("{}")
    require_metrics(tmp_path)  # from another program
    begun(tmp_path)
    require_metrics(tmp_path)  # of an earlier version, without a hash
    begun(tmp_path, metrics="aa")
    with pytest.raises(UserError, match=rf"^{tmp_path}/metrics\.json is damaged: it is not what the run wrote; "):
        require_metrics(tmp_path)
    (tmp_path / "metrics.json").unlink()
    require_metrics(tmp_path)
    require_metrics(tmp_path / RECORD)
