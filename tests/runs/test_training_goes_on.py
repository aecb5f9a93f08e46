"""Stopped training resumes as if it had not been stopped, and only with the same inputs."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS, Stopped
from cogview_pl.runs.record import RunRecord

from .line import SGD, Line, carried_out, configured, samples, saved


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run: Path) -> None:
    """It ends with the same weight after the same samples, and with the same metrics."""
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    config = configured(max_steps=6, accumulate_grad_batches=2)
    whole = Line(config)
    metrics = carried_out(config, whole, samples(*values))
    run.rename("whole")

    first = Line(config, at=4, act=lambda: signal.raise_signal(signal.SIGINT))  # in the first half of step 3
    with pytest.raises(Stopped) as stopped, SIGNALS:
        carried_out(config, first, samples(*values))
    assert stopped.value.code == 130
    assert saved(run)["global_step"] == 3
    config.resume = str(run)
    second = Line(config)
    with SIGNALS:  # forgets the signal, as in another process
        assert carried_out(config, second, samples(*values)) == metrics
    assert first.seen + second.seen == whole.seen and len(first.seen) == 6
    assert torch.equal(second.layer.weight, whole.layer.weight)

    again = Line(config)  # only the validation is left
    assert carried_out(config, again, samples(*values)) == metrics
    assert (again.seen, again.validated) == ([], [6])


def test_a_run_that_was_stopped_before_a_validation_logs_each_step_once(run: Path) -> None:
    """It finishes the validation first."""
    config = configured("logger=tensorboard", log_every_n_steps=1)
    first = Line(config, at=1, act=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped), SIGNALS:
        carried_out(config, first)
    assert first.validated == [2] and saved(run)["global_step"] == 2
    config.resume = str(run)
    with SIGNALS:
        carried_out(config, Line(config))
    steps: list[int] = []
    for file in (run / "tensorboard").glob("events.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("watch-lr-SGD")]
        steps += [event.step for tag in tags for event in events.Scalars(tag)]
    assert sorted(steps) == [0, 1, 2, 3]


def test_a_learning_rate_that_is_lowered_takes_effect(run: Path) -> None:
    """Clipped gradients of 1: each step moves the weight by the learning rate."""
    config = configured()
    with pytest.raises(Stopped), SIGNALS:
        carried_out(config, Line(config, at=1, act=lambda: signal.raise_signal(signal.SIGTERM)))
    assert saved(run)["state_dict"]["layer.weight"].item() == pytest.approx(1.0)
    config.resume = str(run)
    config.optimizer.optimizer["lr"] = 0.25
    module = Line(config)
    with SIGNALS:
        carried_out(config, module)
    assert module.layer.weight.item() == pytest.approx(1.5)
    assert saved(run)["optimizer_states"][0]["param_groups"][0]["lr"] == 0.25


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_another_number_of_batches_for_a_step_holds_from_the_first_step(run: Path, before: int, after: int) -> None:
    """No step has too few batches, every sample is used once, and the validation stays at its step."""
    values = [float(number) for number in range(20)]
    config = configured(accumulate_grad_batches=before)
    first = Line(config, at=2 * before + before - 1, act=lambda: signal.raise_signal(signal.SIGTERM))  # in step 3
    with pytest.raises(Stopped), SIGNALS:
        carried_out(config, first, samples(*values))
    assert saved(run)["global_step"] == 3 and first.validated == [2]
    again = configured(accumulate_grad_batches=after, max_steps=6)
    again.resume = str(run)
    second = Line(again)
    with SIGNALS:
        carried_out(again, second, samples(*values))
    assert (len(first.seen), len(second.seen)) == (3 * before, 3 * after)
    assert len({*first.seen, *second.seen}) == 3 * before + 3 * after
    assert second.validated == [4, 6] and saved(run)["global_step"] == 6


def test_a_run_that_early_stopping_ended_goes_on_as_if_it_had_not_been(run: Path) -> None:
    """Its last checkpoint is its end, between two of every so many steps."""
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    stopping = [
        "+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping",
        "+callbacks.stop.monitor=val/loss",
        "+callbacks.stop.stopping_threshold=1e9",
        "+callbacks.stop.patience=9",
        "callbacks.checkpoint.every_n_train_steps=5",
    ]
    config = configured(*stopping, max_steps=6)
    carried_out(config, Line(config), samples(*values))
    assert saved(run)["global_step"] == 2
    config = configured("callbacks.checkpoint.every_n_train_steps=5", max_steps=6)
    config.resume = str(run)
    second = Line(config)
    metrics = carried_out(config, second, samples(*values))
    run.rename("stopped")
    config.resume = None
    whole = Line(config)
    assert carried_out(config, whole, samples(*values)) == metrics
    assert second.seen == whole.seen[2:] and torch.equal(second.layer.weight, whole.layer.weight)


def test_a_stop_on_another_device_ends_this_process_too(run: Path) -> None:
    """Lightning raises the same exception in all processes; one without a signal ends as by SIGTERM."""
    config = configured()

    def told() -> None:
        raise SIGTERMException

    with pytest.raises(Stopped) as stopped:
        carried_out(config, Line(config, at=1, act=told))
    assert stopped.value.code == 143


def test_a_signal_before_the_first_step_is_heard(run: Path) -> None:
    config = configured()
    module = Line(config)
    with pytest.raises(Stopped), SIGNALS:
        signal.raise_signal(signal.SIGTERM)
        carried_out(config, module)
    assert module.seen == [] and not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", 1, "seed=0, this run has 1"),
        (
            "optimizer.optimizer",
            {**SGD, "_target_": "torch.optim.Adam"},
            "=torch.optim.SGD, this run has torch",
        ),
        ("template.loss", {"text": 0.0}, r"template\.loss=\{.*\}, this run has \{'text': 0\.0\}"),
        ("sequences.replay_share", 0.5, r"sequences\.replay_share=0\.0, this run has 0\.5"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(run: Path, key: str, value: object, words: str) -> None:
    config = configured(max_steps=1)
    carried_out(config, Line(config))
    record = (run / ".cogview_pl.json").read_bytes()
    config.resume = str(run)
    group, _, name = key.rpartition(".")
    setattr(getattr(config, group) if group else config, name, value)
    with pytest.raises(UserError, match=rf"^resume: {run} was begun with .*{words}"):
        carried_out(config, Line(config))
    assert (run / ".cogview_pl.json").read_bytes() == record


def test_a_run_does_not_go_on_with_other_data_but_unverified(run: Path) -> None:
    config = configured()
    carried_out(config, Line(config))
    config.resume = str(run)
    with pytest.raises(UserError, match=r"^resume: data has changed since .*verify=false"):
        carried_out(config, Line(config), inputs={"data": "bb"})
    config.verify = False
    carried_out(config, Line(config), inputs={"data": "bb"})
    assert RunRecord.load(run).inputs == {"data": "bb"}


def refuse(error: BaseException) -> Callable[[object], None]:
    def hook(checkpoint: object) -> None:
        raise error

    return hook


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(run: Path) -> None:
    config = configured(max_steps=1)
    carried_out(config, Line(config))
    config.resume = str(run)
    with pytest.raises(UserError) as refused:
        carried_out(config, Line(config, outputs=2))
    assert str(refused.value).startswith(f"resume: {run}/checkpoints/last.ckpt does not fit this run (Error(s) in")
    assert str(refused.value).endswith("; go on from another checkpoint, or start anew")
    assert "size mismatch for layer.weight" in str(refused.value) and "\n" not in str(refused.value)
    module = Line(config)
    module.on_load_checkpoint = refuse(ValueError())  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"does not fit this run \(ValueError\)"):
        carried_out(config, module)
    for error in (UserError("ours"), FileNotFoundError("gone")):
        module.on_load_checkpoint = refuse(error)  # type: ignore[method-assign]
        with pytest.raises(type(error)) as raised:
            carried_out(config, module)
        assert raised.value is error
