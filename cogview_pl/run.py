"""`python -m cogview_pl.run`: compose the configuration, check it, hand it to a verb.

Exit codes: 0 done; 2 bad input or configuration, or a full disk, with one line that says which; 143 stopped by SIGTERM
and 130 by Ctrl-C, with one line that says how to go on.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogview_pl.cli.overrides import quote_override, quoted
from cogview_pl.cli.streams import use_forgiving_streams, use_utf8_file_names
from cogview_pl.config.choices import Verb
from cogview_pl.config.limits import check_limits
from cogview_pl.config.schema import Config, register_schemas
from cogview_pl.durable.write import disk_full, is_disk_full
from cogview_pl.errors import UserError
from cogview_pl.lit.config import StrategyKind
from cogview_pl.runs.ranks import RANKS, forget_stale_variables

if TYPE_CHECKING:
    from cogview_pl.runs.run_folder import RunFolder

_log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
_PARALLEL = (Verb.fit_image_tokenizer, Verb.fit_sequence_model)  # the first process does the others alone
_MUST_FIT = (*_PARALLEL, Verb.generate)  # into memory
_CHAIN_KEYS = ("experiment", "task", "stages", "common", "run_dir")  # what a chain does not hand on to its stages


def _shipped(name: str) -> Path:
    """`conf/` or `experiments/`: beside the package in a checkout, inside it in an installed wheel."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def _register_experiments(by_name_only: bool) -> None:
    """Every `experiments/NAME/config.yaml` becomes `experiment=NAME`; the working folder's own come on top.

    `by_name_only` leaves them empty: Hydra copies all that is registered a hundred times to print its help.
    """
    for root in dict.fromkeys((_shipped("experiments"), Path("experiments").resolve())):
        for file in sorted(root.glob("*/config.yaml")):
            node = OmegaConf.create() if by_name_only else OmegaConf.load(file)
            ConfigStore.instance().store(group="experiment", name=file.parent.name, node=node, package="_global_")


@hydra.main(version_base="1.3", config_path=str(_shipped("conf")), config_name="config")
def _main(composed: DictConfig) -> dict[str, float | str]:
    job, overrides = None, sys.argv[1:]
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        job, overrides = HydraConfig.get().job.num, [*_flags(), *HydraConfig.get().overrides.task]
    return run_or_give_up(composed, overrides, job)


def run_or_give_up(composed: DictConfig, overrides: list[str], job: int | None = None) -> dict[str, float | str]:
    """Run one composed configuration and return its metrics; what the user can mend becomes one line and exit code 2.

    A run that was told to stop ends with the code of the signal and one line that says how to go on.

    Args:
        composed: the configuration.
        overrides: the words that compose it.
        job: its number in a sweep.
    """
    try:
        return _run(composed, overrides, job)[1]
    except UserError as error:  # caught here, because Hydra would put a line of its own before ours
        _give_up(str(error))
    except OmegaConfBaseException as error:
        _give_up(_one_line(error))
    except OSError as error:
        if error.errno is None:
            raise
        _give_up(_of_the_machine(error))
    except SystemExit as stop:
        if RANKS.first and (advice := getattr(stop, "advice", "")):
            name = stop.signal.name  # type: ignore[attr-defined]
            print(f"\ncogview_pl: stopped by {name}; {advice}", file=sys.stderr)  # behind a progress bar
        raise


def _run(composed: DictConfig, overrides: list[str], job: int | None = None) -> tuple[Path, dict[str, float | str]]:
    """Run one composed configuration; returns its folder and, in the process that writes, its metrics.

    `overrides` are the words that compose it; `job` is its number in a sweep.
    """
    if os.getcwd() not in sys.path:  # for classes of the user's own, which a `_target_` names
        sys.path.append(os.getcwd())
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(f"{missing[0]} has no value; set it on the command line: {missing[0]}=…")
    check_limits(composed)
    if composed.plan.only:
        return Path(), _verb("plan").run(OmegaConf.to_object(composed), _run_stage) if RANKS.first else {}

    from cogview_pl.errors.signals import SIGNALS, Stopped
    from cogview_pl.runs.run_folder import can_go_on, open_run

    if composed.threads is not None:
        import torch

        torch.set_num_threads(composed.threads)
    folder, composed.resume = open_run(composed, job)
    composed.run_dir = str(folder.path)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    try:
        with SIGNALS:
            folder.describe(composed)
            metrics = dict(_carry_out(config, folder, overrides))
            folder.finish(metrics)
    except (UserError, OmegaConfBaseException):
        folder.undo()
        raise
    except Stopped as stop:
        goes_on = can_go_on(folder.path, config.verb)
        stop.advice = stop.advice or (f"go on with resume={folder.path}" if goes_on else "start it again")
        if not goes_on:
            folder.undo()
        raise
    finally:
        folder.unlock()
    if folder.writes:
        _log.info("done: %s", folder.path)
    return folder.path, metrics


def _carry_out(config: Config, folder: RunFolder, overrides: list[str]) -> Mapping[str, float | str]:
    """What the verb does, in as many processes as it is for; returns its metrics."""
    verb = _verb(config.verb.value)
    if config.verb in _PARALLEL:
        verb.check(config)
    if config.verb in _MUST_FIT:
        with RANKS.first_goes_ahead() as first:
            if first:
                _verb("plan").require_fit(config)
    if config.verb == Verb.chain:
        return verb.run(config, folder, _run_stage)  # type: ignore[no-any-return]
    if config.verb in _PARALLEL or _paints_together(config):
        with RANKS.launching([*overrides, f"run_dir={quoted(str(folder.path))}"]):
            return verb.run(config, folder)  # type: ignore[no-any-return]
    with RANKS.first_goes_ahead() as first:
        return verb.run(config, folder) if first else {}


def _paints_together(config: Config) -> bool:
    return config.verb == Verb.generate and config.strategy.kind == StrategyKind.tp


def _run_stage(overrides: list[str]) -> tuple[Path, dict[str, float | str]]:
    """One task of a chain: its own overrides, then those that the user gave for the chain."""
    given = [
        override
        for override in HydraConfig.get().overrides.task
        if override.lstrip("+~").split("=")[0].split(".")[0] not in _CHAIN_KEYS
    ]
    words = [*map(quote_override, overrides), *given]
    return _run(hydra.compose("config", overrides=words), [*_flags(), *words])


def _flags() -> list[str]:
    """Words of the command line that say where configurations are."""
    return [word for word in sys.argv[1:] if word.startswith("--config")]


def _verb(name: str) -> Any:
    return importlib.import_module(f"cogview_pl.tasks.{name}")


def _quiet_where_full(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer is a thread: that its disk is full is said once, by the main one."""
    if not is_disk_full(failed.exc_value):
        threading.__excepthook__(failed)


def main() -> None:
    """Entry point: turns errors that the user can mend into one line and exit code 2."""
    use_utf8_file_names()
    use_forgiving_streams()
    forget_stale_variables()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a run listens, Ctrl-C just ends the process
    threading.excepthook = _quiet_where_full
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing and exiting with 1
    sys.argv[1:] = map(quote_override, sys.argv[1:])
    _require_launcher()
    register_schemas()
    asks_for_help = bool({"--help", "-h"} & set(sys.argv[1:]))
    _register_experiments(by_name_only=asks_for_help)
    if asks_for_help and not any(word.startswith("task=") for word in sys.argv):
        sys.argv.append("task=vqvae")  # help is composed from a whole configuration, so some task must be named
    try:
        _main()
    except (HydraException, OmegaConfBaseException) as error:
        _give_up(_one_line(error))
    except OverflowError as error:  # OmegaConf's, of a value with hundreds of digits
        if "full_key:" not in str(error):
            raise
        _give_up(_one_line(error))


_OPEN_FILES = (errno.EMFILE, errno.ENFILE)


def _of_the_machine(error: OSError) -> str:
    """One line for what the machine refuses, with the file where it is known."""
    if is_disk_full(error):
        return disk_full(Path(error.filename or "a file of this run"))
    if error.errno in _OPEN_FILES:
        return f"{error.strerror}: this process may not open another one; raise the limit (ulimit -n), then go on"
    return f"{error.filename or 'a file'}: {error.strerror}; see to the disk and its permissions, then go on"


def _require_launcher() -> None:
    wanted = [word for word in sys.argv[1:] if word.startswith("hydra/launcher=submitit")]
    if wanted and importlib.util.find_spec("submitit") is None:
        _give_up(f'{wanted[0]} needs hydra-submitit-launcher; pip install "cogview_pl[slurm]"')


_INTERNALS = ("object_type=", "full_key:", "reference_type=", "See https://", "Config search path:", "provider=")
_NO_SUCH_KEY = re.compile(r"\.\s+To append to your config use .*")


def _one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages without their hints on internals."""
    if str(error).startswith("Error merging override") and error.__cause__ is not None:
        error = error.__cause__  # says which value is wrong, and why
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    keys = [line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")]
    keys += [error.override] if isinstance(error, OverrideParseException) else []
    prefix = f"{keys[0]}: " if keys and keys[0] else ""
    message = prefix + " ".join(line for line in lines if not line.startswith(_INTERNALS))
    message = message.replace("KeyError raised while resolving interpolation: ", "")
    return _NO_SUCH_KEY.sub("; there is no such key, `task=… --cfg job` lists them all", message)


def _give_up(message: str) -> NoReturn:
    if RANKS.first:  # the others found the same
        print(f"cogview_pl: {' '.join(message.split())}", file=sys.stderr)
    sys.unraisablehook = lambda unraisable: None  # finalisers of what never came up have nothing to add
    sys.exit(2)


if __name__ == "__main__":
    main()
