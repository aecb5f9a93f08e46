"""`python -m cogview_pl.run`: compose the configuration, check it, hand it to a verb.

Exit codes: 0 done; 2 bad input or configuration, with one line that says which; 143 stopped by SIGTERM, resumable.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogview_pl.choices import StrategyKind, Verb
from cogview_pl.config import Config, register_schemas
from cogview_pl.errors import UserError
from cogview_pl.limits import check_limits
from cogview_pl.shell import quote_override, quoted
from cogview_pl.tasks.processes import THESE

_log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
_PARALLEL = (Verb.fit_image_tokenizer, Verb.fit_sequence_model, Verb.chain)  # the first process does the others alone
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
    try:
        return _run(composed, overrides, job)[1]
    except UserError as error:  # caught here, because Hydra would put a line of its own before ours
        _give_up(str(error))
    except OmegaConfBaseException as error:
        _give_up(_one_line(error))


def _run(composed: DictConfig, overrides: list[str], job: int | None = None) -> tuple[Path, dict[str, float | str]]:
    """Run one composed configuration; returns its folder and, in the process that writes, its metrics.

    `overrides` are the words that compose it; `job` is its number in a sweep.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(f"{missing[0]} has no value; set it on the command line: {missing[0]}=…")
    check_limits(composed)
    if composed.plan.only:
        return Path(), _verb("plan").run(OmegaConf.to_object(composed), _run_stage) if THESE.first else {}

    from cogview_pl.tasks.run_folder import interrupted_run, new_run, open_run

    if composed.threads is not None:
        import torch

        torch.set_num_threads(composed.threads)
    if composed.resume:
        proof = "store/header.json" if composed.verb == Verb.tokenize else "checkpoints/last.ckpt"
        find = partial(interrupted_run, composed.outputs, composed.task, composed.resume, proof)
    else:
        find = partial(new_run, composed.outputs, composed.task, composed.run_dir, job)
    folder = open_run(find, composed.run_dir)
    composed.run_dir = str(folder.path)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    verb = _verb(config.verb.value)
    try:
        folder.save_config(composed)
        with THESE.first_goes_ahead() as first:
            if first:
                _verb("plan").require_fit(config)
        if config.verb == Verb.chain:
            metrics = verb.run(config, folder, _run_stage)
        elif config.verb in _PARALLEL or _paints_together(config):
            with THESE.launching([*overrides, f"run_dir={quoted(str(folder.path))}"]):
                metrics = verb.run(config, folder)
        else:
            with THESE.first_goes_ahead() as first:
                metrics = verb.run(config, folder) if first else {}
        folder.finish(metrics)
    except (UserError, OmegaConfBaseException):
        folder.undo()
        raise
    if folder.writes:
        _log.info("done: %s", folder.path)
    return folder.path, metrics


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


def main() -> None:
    """Entry point: turns errors that the user can mend into one line and exit code 2."""
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
    if THESE.first:  # the others found the same
        print(f"cogview_pl: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
