"""`python -m cogview_pl.run`: compose the configuration, check it, hand it to a verb.

Exit codes: 0 done; 2 bad input or configuration, with one line that says which; 143 stopped by SIGTERM, resumable.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogview_pl.config import Config, Verb, register_schemas
from cogview_pl.errors import UserError
from cogview_pl.limits import check_limits
from cogview_pl.shell import quote_override

_log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
_RUN_DIR_OF_RANK_0 = "COGVIEW_PL_RUN_DIR"
_MUST_FIT = (Verb.fit_image_tokenizer, Verb.fit_sequence_model, Verb.generate)
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
    job = HydraConfig.get().job.num if HydraConfig.get().mode == RunMode.MULTIRUN else None
    try:
        return _run(composed, job)[1]
    except UserError as error:  # caught here, because Hydra would put a line of its own before ours
        _give_up(str(error))
    except OmegaConfBaseException as error:
        _give_up(_one_line(error))


def _run(composed: DictConfig, job: int | None = None) -> tuple[Path, dict[str, float | str]]:
    """Run one composed configuration; returns its folder and its metrics."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(f"{missing[0]} has no value; set it on the command line: {missing[0]}=…")
    check_limits(composed)
    if composed.plan.only:
        return Path(), _verb("plan").run(OmegaConf.to_object(composed), _run_stage)

    from cogview_pl.tasks.run_folder import interrupted_run, new_run

    if composed.threads is not None:
        import torch

        torch.set_num_threads(composed.threads)
    first = _RUN_DIR_OF_RANK_0 not in os.environ or "LOCAL_RANK" not in os.environ  # of the processes of this run
    if composed.resume:
        proof = "store/header.json" if composed.verb == Verb.tokenize else "checkpoints/last.ckpt"
        folder = interrupted_run(composed.outputs, composed.task, composed.resume, proof)
    else:
        given = composed.run_dir if first else os.environ[_RUN_DIR_OF_RANK_0]
        folder = new_run(composed.outputs, composed.task, given, job if first else None)
    composed.run_dir = str(folder.path)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    os.environ[_RUN_DIR_OF_RANK_0] = config.run_dir or ""
    try:
        if first:
            folder.save_config(composed)
        if first and config.verb in _MUST_FIT:
            _verb("plan").require_fit(config)
        verb = _verb(config.verb.value)
        metrics = verb.run(config, folder, _run_stage) if config.verb == Verb.chain else verb.run(config, folder)
        if first:
            folder.finish(metrics)
    except (UserError, OmegaConfBaseException):
        folder.undo()
        raise
    finally:
        if first:
            os.environ.pop(_RUN_DIR_OF_RANK_0, None)
    _log.info("done: %s", folder.path)
    return folder.path, metrics


def _run_stage(overrides: list[str]) -> tuple[Path, dict[str, float | str]]:
    """One task of a chain: its own overrides, then those that the user gave for the chain."""
    given = [
        override
        for override in HydraConfig.get().overrides.task
        if override.lstrip("+~").split("=")[0].split(".")[0] not in _CHAIN_KEYS
    ]
    return _run(hydra.compose("config", overrides=[*map(quote_override, overrides), *given]))


def _verb(name: str) -> Any:
    return importlib.import_module(f"cogview_pl.tasks.{name}")


def main() -> None:
    """Entry point: turns errors that the user can mend into one line and exit code 2."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing and exiting with 1
    sys.argv[1:] = map(quote_override, sys.argv[1:])
    register_schemas()
    asks_for_help = bool({"--help", "-h"} & set(sys.argv[1:]))
    _register_experiments(by_name_only=asks_for_help)
    if asks_for_help and not any(word.startswith("task=") for word in sys.argv):
        sys.argv.append("task=vqvae")  # help is composed from a whole configuration, so some task must be named
    try:
        _main()
    except (HydraException, OmegaConfBaseException) as error:
        _give_up(_one_line(error))


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
    print(f"cogview_pl: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
