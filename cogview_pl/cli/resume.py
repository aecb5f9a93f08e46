"""Composes the configuration of a resumed run: that of the run itself, with the overrides given now on top."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from cogview_pl.cli.overrides import quoted
from cogview_pl.config.choices import Verb
from cogview_pl.config.continuation import changed_values, differing_keys, keep_schedule, leaves, take_over
from cogview_pl.config.shipped import shipped
from cogview_pl.durable.latest import through_latest
from cogview_pl.errors import UserError
from cogview_pl.runs.history import parsed_config, read_newest_config
from cogview_pl.runs.interrupted import is_finished, newest_interrupted, run_to_resume
from cogview_pl.runs.ranks import RANKS
from cogview_pl.runs.record import RunRecord, is_run

_log = logging.getLogger(__name__)

_OF_THIS_CALL = ("hydra", "plan")
"""Groups whose choices hold for one part of a run."""
_EXPERIMENT = "experiment"
"""A group that only sets values and choices; the run has them, so its choice is noted and not composed again."""


class Composed(NamedTuple):
    """A configuration, and its origin."""

    config: DictConfig
    words: list[str]
    """Words of the command line that compose it."""
    choices: dict[str, str]
    """Group → choice, and key that an override adds, as `++KEY` → value."""
    given: list[str]
    """Overrides that are given now, without choices that come from the run that is resumed."""
    changes: dict[str, tuple[Any, Any]]
    """Key that differs from the run that is resumed → value there, value here."""
    finished: Path | None = None
    """Folder of the run, if its training has finished and nothing changes."""

    @property
    def comment(self) -> str:
        """First line of the file of configuration of a resumed run; empty for a new run."""
        if not self.config.resume:
            return ""
        now = datetime.now().isoformat(" ", "seconds")
        return f"# Resumed {now} from {self.config.resume}; changed: {_changes_in_words(self.changes)}\n"


def compose(words: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """The configuration that words of the command line compose, and its choices of groups."""
    composed = hydra.compose("config", overrides=overrides_in(words), return_hydra_config=True)
    choices = choices_in(composed.hydra)
    with open_dict(composed):
        del composed["hydra"]
    return composed, choices


def choices_in(node: Any) -> dict[str, str]:
    """Group → choice, of the node `hydra` of a configuration."""
    found = {str(group): choice for group, choice in node.runtime.choices.items() if choice is not None}
    return {group: str(choice) for group, choice in found.items() if group.partition("/")[0] not in _OF_THIS_CALL}


def overrides_in(words: Iterable[str]) -> list[str]:
    """The overrides among words of the command line."""
    return [word for word in words if not word.startswith("-") and ("=" in word or word.startswith("~"))]


def with_choices_of_the_run(words: list[str]) -> list[str]:
    """The words, and the choices of the run that they resume for groups that they do not name.

    So `resume=RUN` is a whole command line, and an override may name a key that only those choices have.
    """
    if not any(word.lstrip("+").startswith("resume=") for word in words):
        return words
    parsed = OverridesParser.create().parse_overrides(overrides_in(words))
    given = {one.key_or_group: "" if one.is_sweep_override() else str(one.value()) for one in parsed}
    folder = _folder_of(given)
    if folder is None or not is_run(folder):
        return words
    return [*_missing_choices(RunRecord.load(folder), given), *words]


def continued(composed: DictConfig, words: list[str], job: str | None, choices: dict[str, str]) -> Composed:
    """The configuration of the run that `resume` names, with the overrides in `words` on top; else `composed`.

    Args:
        composed: what `words` compose.
        words: words of the command line.
        job: name of the run in a sweep.
        choices: group → choice, of `composed`.

    Raises:
        UserError: there is no such run, it is of another task, or its configuration is damaged.
    """
    found = _agreed(composed, job) if composed.resume else None
    if found is None:
        composed.resume = None  # `auto`, and no run has begun
        return Composed(composed, words, choices | _added(words), overrides_in(words), {})
    folder, resume, text, finished = found
    record, saved = RunRecord.load(folder), parsed_config(folder, text)
    kept = {f"{name}={value}" for name, value in record.choices.items()}
    given_now = [word for word in overrides_in(words) if word not in kept]
    given = OverridesParser.create().parse_overrides(given_now)
    _require_task(folder, record, given)
    names = [word.lstrip("+~").partition("=")[0] for word in overrides_in(words)]
    missing = _missing_choices(record, names) if record.choices else []
    words = [*missing, *words, f"resume={quoted(resume)}"]
    if missing:
        composed, choices = compose(words)
    own = [*_keys_of_values(given), *_keys_of_choices(record, given)] if given else []
    take_over(composed, saved, own)
    keep_schedule(composed, saved, own)
    composed.resume = resume
    changes = changed_values(composed, saved)
    if RANKS.first and changes:
        _log.info("resumed with other values: %s", _changes_in_words(changes))
    choices = record.choices | choices | _added(words)
    # Other tasks look for changed inputs and missing files, which takes them no time.
    nothing_left = finished and not changes and (composed.verb.trains_in_parallel or composed.verb == Verb.chain)
    return Composed(composed, words, choices, given_now, changes, folder if nothing_left else None)


def _agreed(composed: DictConfig, job: str | None) -> tuple[Path, str, str, bool] | None:
    """Folder of the run, `resume` as a path, its newest configuration, and whether it has finished; None: no run.

    The first process looks them up, because files may change before the others look.
    """
    found = ("", "", "", "")
    with RANKS.first_goes_ahead() as first:
        if first or RANKS.size == 1:
            run = run_to_resume(composed, job)
            if run is not None:
                hashes = RunRecord.load(run[0]).configurations if composed.verify else {}
                text = read_newest_config(run[0], hashes)
                found = (str(run[0]), run[1], text, "finished" if is_finished(run[0]) else "")
    folder, resume, text, finished = (str(RANKS.agree(part)) for part in found)
    return (Path(folder), resume, text, bool(finished)) if folder else None


def _folder_of(given: Mapping[str, str]) -> Path | None:
    """Folder of the run that `resume` names, as far as it is known before anything is composed."""
    resume, task = given.get("resume", ""), given.get("task", given.get(_EXPERIMENT, ""))
    if resume.lower() == "true" and task:
        outputs = given.get("outputs") or OmegaConf.load(shipped("conf") / "config.yaml").outputs
        with suppress(UserError):  # whoever looks again, with the whole configuration, reports it
            return newest_interrupted(Path(outputs).expanduser() / task)
    resume = given.get("run_dir", "") if resume == "auto" else resume
    if resume.lower() in ("", "none", "true", "false"):
        return None
    path = through_latest(Path(resume).expanduser())
    return path.resolve().parent.parent if path.suffix == ".ckpt" else path


def _missing_choices(record: RunRecord, given: Iterable[str]) -> list[str]:
    """Overrides for the choices of the run and the keys that it adds, without those that are given now."""
    given = set(given)
    if _EXPERIMENT in given:  # it makes choices of its own
        return []
    given.add(_EXPERIMENT)
    choices = {"task": record.task, **record.choices}
    return [f"{name}={choice}" for name, choice in choices.items() if name.lstrip("+") not in given]


def _added(words: Iterable[str]) -> dict[str, str]:
    """Keys that overrides add, as `+KEY`, and their values."""
    pairs = (word.partition("=") for word in overrides_in(words) if word.startswith("+"))
    return {f"++{key.lstrip('+')}": value for key, _, value in pairs if "." in key}


def _require_task(folder: Path, record: RunRecord, given: Sequence[Override]) -> None:
    """Raises UserError if the task that is given now is another one."""
    for override in given:
        task = str(override.value()) if override.key_or_group == "task" else record.task
        if task not in (record.task, record.choices.get("task")):
            raise UserError(
                f"resume: {folder} is a run of task={record.task}, this is task={task}; give a run of this task, or "
                f"start a new one with init_from={folder}"
            )


def _groups() -> set[str]:
    return set(GlobalHydra.instance().config_loader().list_groups(""))


def _keys_of_values(given: Sequence[Override]) -> Iterator[str]:
    """Keys that overrides of values set or delete; a mapping is merged, so it sets the keys in it."""
    groups = _groups()
    for override in given:
        key = override.key_or_group
        if key in groups or override.package is not None or key.partition("/")[0] in _OF_THIS_CALL:
            continue
        value = override.value()
        yield from (name for name, _ in leaves({key: value}))


def _keys_of_choices(record: RunRecord, given: Sequence[Override]) -> list[str]:
    """Keys that change with the choices of groups that differ from those of the run."""
    groups = _groups() - set(_OF_THIS_CALL)
    chosen = {o.get_key_element(): o for o in given if o.key_or_group in groups and o.key_or_group != "task"}
    known = record.choices.get
    changed = {name: one for name, one in chosen.items() if one.is_delete() or known(name) != str(one.value())}
    if not changed:
        return []
    before, _ = compose(_missing_choices(record, []))
    after, _ = compose([*_missing_choices(record, changed), *(str(one.input_line) for one in changed.values())])
    return differing_keys(before, after)


def _changes_in_words(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}={now} (was {before})" for key, (before, now) in changes.items()) or "nothing"
