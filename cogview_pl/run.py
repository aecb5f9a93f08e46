"""`python -m cogview_pl.run`: compose the configuration, check it, hand it to a verb.

Exit codes: 0 done; 1 a job of a sweep has failed; 2 bad input or configuration, or a full disk, with one line that says
which; 143 stopped by SIGTERM, 130 by Ctrl-C and 129 by the loss of its terminal, with one line that says how to go on.
"""

from __future__ import annotations

import importlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cogview_pl.cli import command_line
from cogview_pl.cli.help import help_or_version
from cogview_pl.cli.messages import errors_in_one_line
from cogview_pl.cli.overrides import quote_override, quoted
from cogview_pl.cli.process import prepare_process
from cogview_pl.cli.python import nothing_left, with_configuration
from cogview_pl.cli.resume import Composed, choices_in, compose, continued, with_choices_of_the_run
from cogview_pl.cli.summary import print_summary
from cogview_pl.cli.sweep import run_job_of_sweep, table_at_the_end
from cogview_pl.config.choices import Verb
from cogview_pl.config.experiments import register_experiments
from cogview_pl.config.ignored_keys import refuse_ignored_keys
from cogview_pl.config.keys import check_keys
from cogview_pl.config.limits import check_limits
from cogview_pl.config.paths import resolve_paths
from cogview_pl.config.schema import Config, register_schemas
from cogview_pl.config.shipped import shipped
from cogview_pl.errors import UserError
from cogview_pl.lit.bars import status
from cogview_pl.lit.config import StrategyKind
from cogview_pl.runs.command import config_flags
from cogview_pl.runs.interrupted import can_go_on, finished_metrics
from cogview_pl.runs.lifetime import free_memory, run_folder
from cogview_pl.runs.ranks import RANKS
from cogview_pl.runs.run_folder import Metrics, RunFolder, dated_folder
from cogview_pl.runs.side_by_side import StageProcess, start_process
from cogview_pl.vqvae.config import import_external, import_quantizer

_log = logging.getLogger(__name__)


def run(*overrides: str) -> dict[str, float | str]:
    """Run a task from Python, as `python -m cogview_pl.run` does with these overrides; returns its metrics.

    `run("task=pretrain", "trainer.max_steps=100")` trains in this process and leaves no settings behind.

    Raises:
        UserError: bad input or configuration; the message says what to mend.
        Stopped: by a signal, such as Ctrl-C; its advice says how the run goes on.
    """
    register_schemas()
    register_experiments()
    with nothing_left():
        words = with_choices_of_the_run(command_line.hydra_words(list(overrides)))
        if not command_line.is_one_run(words):
            raise UserError(f"run{overrides} takes overrides of one run (task=vqvae), no options; call it once per run")
        metrics = dict(with_configuration(words, lambda composed: _run_one(composed, words), logs=False))
        free_memory()  # the next call may come at once
        return metrics


def _run_one(composed: DictConfig, words: list[str], job: str | None = None) -> Metrics:
    return run_composed(composed, words, job, choices_in(HydraConfig.get()))[1]


@hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name="config")
def _main(composed: DictConfig) -> Metrics | float | None:
    job, words = command_line.job_name(), command_line.job_words()
    if job is not None:
        return run_job_of_sweep(composed, lambda: _run_one(composed, words, job))
    with errors_in_one_line():  # here, because Hydra would print a line of its own first
        return _run_one(composed, words)


def run_composed(
    composed: DictConfig,
    words: list[str],
    job: str | None = None,
    choices: dict[str, str] | None = None,
    begun: Callable[[Path], None] = lambda path: None,
    *,
    alone: bool = True,
) -> tuple[Path, Metrics]:
    """Run the configuration that `words` compose; returns its folder and its metrics.

    Only the process that writes has metrics.

    Args:
        composed: the configuration.
        words: words of the command line that compose it.
        job: name of the run in a sweep.
        choices: group → choice, of `composed`.
        begun: called with the folder once it is known.
        alone: whether it is no stage of a chain.
    """
    started = time.monotonic()
    resolve_paths(composed)
    found = continued(composed, words, job, choices or {})
    if found.finished is not None:
        begun(found.finished)
        return found.finished, finished_metrics(found.finished)
    composed, words = found.config, found.words
    if alone:
        refuse_ignored_keys(composed, found.given)
    check_keys(composed)
    check_limits(composed)
    resolve_paths(composed)
    if "torch" not in sys.modules:
        status("importing PyTorch …")
    import_quantizer(composed.image_tokenizer.quantizer)
    import_external(composed.image_tokenizer.external)
    for sentence in _take_from_weights(composed, found.given):
        if RANKS.first:
            _log.info("%s", sentence)
    if composed.plan.only:
        plan, recompose = _verb("plan"), _recompose(words, job)
        return Path(), plan.run(OmegaConf.to_object(composed), _plan_stage, recompose) if RANKS.first else {}
    if composed.threads is not None:
        import torch

        torch.set_num_threads(composed.threads)
    with run_folder(composed, job, found.choices, found.comment) as folder:
        begun(folder.path)
        config: Any = OmegaConf.to_object(composed)
        metrics = _dispatch(config, folder, found, job)
        folder.finish(metrics)
    next_words = words if alone and job is None else []
    print_summary(folder, composed, metrics, next_words, time.monotonic() - started)
    return folder.path, metrics


def _dispatch(config: Config, folder: RunFolder, found: Composed, job: str | None) -> Metrics:
    """Run the verb in all its processes; returns its metrics."""
    if config.verb.trains_in_parallel and "lightning" not in sys.modules:
        status("importing Lightning …")
    verb = _verb(config.verb.value)
    if config.verb.trains_in_parallel or config.verb.shares_batches:
        _check_devices(config)
    if config.verb.trains_in_parallel:
        verb.check(config)
    if config.verb.must_fit:
        with RANKS.first_goes_ahead() as first:
            if first:
                _verb("plan").require_fit(config, _recompose(found.words, job))
    if config.verb == Verb.chain:
        given = command_line.words_for_stages(found.choices if config.resume else {})
        return verb.run(config, folder, _run_stage, _start_stage, given)  # type: ignore[no-any-return]
    command = [*found.words, f"run_dir={quoted(str(folder.path))}"]
    if config.verb.trains_in_parallel:
        with RANKS.launching(command):
            return verb.run(config, folder)  # type: ignore[no-any-return]
    if config.verb.shares_batches:
        return _share_batches(config, folder, verb, command)
    with RANKS.first_goes_ahead() as first:
        return verb.run(config, folder) if first else {}


def _check_devices(config: Config) -> None:
    from cogview_pl.assembly.devices import check_devices  # imports torch

    check_devices(config.trainer)


def _share_batches(config: Config, folder: RunFolder, verb: Any, command: list[str]) -> Metrics:
    """Run a verb whose prompts or images the devices share; with tensor parallelism they share the model instead."""
    from cogview_pl.assembly.strategy import num_devices  # imports torch
    from cogview_pl.data.sharing import Team
    from cogview_pl.runs.team import working_together

    if config.verb == Verb.generate and config.strategy.kind == StrategyKind.tp:
        with RANKS.launching(command):
            return verb.run(config, folder, Team())  # type: ignore[no-any-return]
    with working_together(num_devices(config.trainer), config.trainer["num_nodes"], command) as team:
        return {} if team is None else verb.run(config, folder, team)


def _run_stage(
    overrides: list[str], given: Sequence[str], begun: Callable[[Path], None], interrupted: Path | None
) -> tuple[Path, Metrics]:
    """Run one task of a chain, or go on with it (see `tasks.chain.RunStage`)."""
    words = [*map(quote_override, overrides), *given]
    composed, choices = compose(words)
    if interrupted is not None and can_go_on(interrupted, composed.verb.value):
        words.append(f"resume={quoted(str(interrupted))}")
        composed.resume = str(interrupted)
    return run_composed(composed, [*config_flags(), *words], choices=choices, begun=begun, alone=False)


def _start_stage(
    overrides: list[str], given: Sequence[str], interrupted: Path | None, log: Path, threads: int
) -> StageProcess:
    """Start one task of a chain in a process of its own (see `tasks.chain.StartStage`)."""
    words = [*map(quote_override, overrides), *given, f"threads={threads}"]
    composed, _ = compose(words)
    resolve_paths(composed)
    if interrupted is not None and can_go_on(interrupted, composed.verb.value):
        folder = interrupted
        words.append(f"resume={quoted(str(folder))}")
    else:
        folder = dated_folder(Path(composed.outputs) / composed.task)
        words.append(f"run_dir={quoted(str(folder))}")
    return start_process([*config_flags(), *words], folder, log)


def _plan_stage(overrides: list[str]) -> tuple[Path, Metrics]:
    """Plan one task of a chain."""
    return _run_stage(overrides, command_line.words_for_stages({}), lambda path: None, None)


def _recompose(words: list[str], job: str | None) -> Callable[[str], Any]:
    """Return a function that composes the configuration of `words` with further overrides, separated by spaces."""

    def composed(more: str) -> Any:
        every = [*words, *more.split()]
        config, choices = compose(every)
        found = continued(config, every, job, choices)
        _take_from_weights(found.config, found.given)
        return OmegaConf.to_object(found.config)

    return composed


def _take_from_weights(composed: DictConfig, given: list[str]) -> list[str]:
    from cogview_pl.config.from_weights import take_from_weights  # imports torch

    return take_from_weights(composed, given)


def _verb(name: str) -> Any:
    return importlib.import_module(f"cogview_pl.tasks.{name}")


def main() -> None:
    """Entry point."""
    prepare_process()
    with errors_in_one_line(), table_at_the_end():
        if text := help_or_version(sys.argv[1:]):
            print(text)
            return
        register_schemas()
        register_experiments()
        words = sys.argv[1:] = with_choices_of_the_run(command_line.hydra_words(sys.argv[1:]))
        if command_line.is_one_run(words):
            with_configuration(words, lambda composed: _run_one(composed, words), logs=True)
        else:
            _main()


class _CallableModule(ModuleType):
    """This module, called as its function `run`: `from cogview_pl import run` finds the module once it is imported."""

    def __call__(self, *overrides: str) -> dict[str, float | str]:
        return run(*overrides)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    # By its name, because a launcher of remote jobs sends the functions of `__main__` with copies of all their globals.
    importlib.import_module("cogview_pl.run").main()
