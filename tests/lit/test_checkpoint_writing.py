"""Large checkpoints are written by a thread from a copy, `last.ckpt` is a second name of the newest step."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cogview_pl.durable.write import link
from cogview_pl.errors import UserError
from cogview_pl.lit.checkpoint_io import DurableCheckpointIO
from cogview_pl.lit.snapshot import Snapshots, num_bytes

from .fitting import loader, trainer
from .test_best_checkpoint import LOSSES, Scored
from .test_checkpoints import Fails, Model, callback, run, steps_of

LARGE = 5_000_000
"""Numbers of a tensor that takes some time to write."""


def checkpoint() -> dict[str, Any]:
    """What Lightning saves, with tensors that share memory, and an object that appears twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    whole, shared = torch.arange(12.0), {"lr": 0.1, "betas": (0.9, 0.95)}
    return {
        "state_dict": model.state_dict(),  # has `_metadata`
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3, dtype=torch.bfloat16)}}, "groups": [shared]}],
        "views": OrderedDict(one=whole[:4], other=whole.view(3, 4).T, empty=torch.empty(0), scalar=torch.tensor(3)),
        "hyperparameters": shared,
        "parameter": nn.Parameter(torch.zeros(2)),
        "step": 7,
        "none": None,
        "words": ["a", "b"],
    }


def background() -> DurableCheckpointIO:
    io = DurableCheckpointIO()
    io.background_bytes = 0
    return io


def test_a_copy_makes_the_same_file(tmp_path: Path) -> None:
    """Also in memory that an earlier copy has used, and for a larger checkpoint after a smaller one."""
    io = background()
    io.save_checkpoint({"a": torch.zeros(2)}, tmp_path / "small.ckpt")
    for name in ("first.ckpt", "second.ckpt"):
        io.save_checkpoint(checkpoint(), tmp_path / name)
        io.wait()
        DurableCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "direct" / name)
        assert (tmp_path / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    io.teardown()


def test_a_copy_does_not_see_later_changes() -> None:
    original = checkpoint()
    copied = Snapshots().copy(original)
    original["state_dict"]["0.weight"].zero_()
    original["views"]["one"].zero_()
    original["hyperparameters"]["lr"] = 0.0
    original["words"].append("c")
    assert copied["state_dict"]["0.weight"].abs().min() > 0
    assert copied["views"]["other"].tolist() == torch.arange(12.0).view(3, 4).T.tolist()
    assert copied["views"]["one"].untyped_storage().data_ptr() == copied["views"]["other"].untyped_storage().data_ptr()
    assert copied["optimizer_states"][0]["groups"][0] is copied["hyperparameters"] and copied["words"] == ["a", "b"]
    assert copied["hyperparameters"]["lr"] == 0.1


def test_shared_memory_is_counted_once() -> None:
    whole = torch.zeros(100)
    assert num_bytes({"a": whole, "b": [whole[:50], whole.view(10, 10)], "c": nn.Parameter(torch.zeros(2))}) == 408


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has the numbers of the time when it was asked for; links and deletions follow it in their order."""
    io, tensor, disk_is_slow = background(), torch.ones(1000), threading.Event()
    new, old, last = (tmp_path / name for name in ("step_2.ckpt", "step_1.ckpt", "last.ckpt"))
    old.write_bytes(b"old")
    link(old, last)
    monkeypatch.setattr(os, "fsync", lambda descriptor: disk_is_slow.wait())
    io.save_checkpoint({"a": tensor}, new)
    io.link_checkpoint(new, last)
    io.remove_checkpoint(old)
    tensor.zero_()
    assert not new.exists() and last.samefile(old)
    disk_is_slow.set()
    io.wait()
    assert last.samefile(new) and not old.exists() and len(list(tmp_path.iterdir())) == 2
    assert torch.load(last, weights_only=True)["a"].eq(1).all()


def test_one_checkpoint_is_under_way_at_most(tmp_path: Path) -> None:
    io = background()
    for number in range(3):
        io.save_checkpoint({"a": torch.full((LARGE,), number)}, tmp_path / f"{number}.ckpt")
        assert all((tmp_path / f"{earlier}.ckpt").exists() for earlier in range(number))
    io.teardown()
    assert torch.load(tmp_path / "2.ckpt", weights_only=True)["a"].eq(2).all()


@pytest.mark.parametrize("background_mb", [None, 0])
@pytest.mark.parametrize("monitor", ["step", "val/loss"])
def test_the_newest_step_has_two_names(tmp_path: Path, monitor: str, background_mb: int | None) -> None:
    """And is the same file for both: it knows of `last.ckpt` and of itself."""
    seen = []

    class Looks(Scored):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.trainer.strategy.checkpoint_io.wait()  # type: ignore[attr-defined]
            seen.append({file.name: file.stat().st_ino for file in tmp_path.glob("*.ckpt")})

    run(tmp_path, Looks(LOSSES), 10, monitor=monitor, mode=None, background_mb=background_mb)
    if monitor == "step":
        assert seen[3]["last.ckpt"] == seen[3]["step_3.ckpt"] and seen[7]["last.ckpt"] == seen[7]["step_6.ckpt"]
        assert set(seen[7]) == {"last.ckpt", "step_6.ckpt"}
    else:
        assert seen[4]["last.ckpt"] == seen[4]["step_4.ckpt"]
        assert seen[9]["last.ckpt"] != seen[9]["step_6.ckpt"]  # step 8 is not the best
    state = torch.load(tmp_path / ("step_9.ckpt" if monitor == "step" else "step_6.ckpt"), weights_only=True)
    (own,) = (found for name, found in state["callbacks"].items() if name.startswith("Checkpoints"))
    assert Path(own["last_model_path"]).name == "last.ckpt"


def test_a_copy_stands_in_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuses)
    run(tmp_path, Model(), 3)
    last, newest = tmp_path / "last.ckpt", tmp_path / "step_3.ckpt"
    assert not last.samefile(newest) and last.read_bytes() == newest.read_bytes()


def test_a_file_is_linked_to_itself_and_over_others(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.write_text("2")
    for _ in range(2):
        link(one, other)
        assert other.samefile(one) and sorted(os.listdir(tmp_path)) == ["one", "other"]


class Fat(Model):
    """Has a large checkpoint from a step on."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.global_step >= self.step:
            checkpoint["fat"] = torch.zeros(100_000)


def test_a_full_disk_ends_the_run_and_nothing_is_lost(tmp_path: Path) -> None:
    """Checkpoints of step 3 are kept; those of step 6 do not fit, and are not tried again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError) as error:
            run(tmp_path, Fat(6), 99, save_on_exception=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'step_6.ckpt'}: no space left on the disk") and "\n" not in said
    assert steps_of(tmp_path) == {"last.ckpt": 3, "step_3.ckpt": 3}
    assert len(list(tmp_path.iterdir())) == 2  # no draft


def test_an_error_of_the_run_waits_for_what_is_being_written(tmp_path: Path) -> None:
    class Large(Model):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["large"] = torch.ones(LARGE)

    with pytest.raises(Fails):
        run(tmp_path, Large(Fails(), ("inside", 3)), 9)
    assert steps_of(tmp_path) == {"last.ckpt": 3, "step_3.ckpt": 3}


def test_a_trainer_that_cannot_write_them_is_named(tmp_path: Path) -> None:
    given = trainer(1, enable_checkpointing=True, callbacks=[callback(tmp_path)], plugins=[])
    with pytest.raises(TypeError, match="plugins="):
        given.fit(Model(), loader([0]))
