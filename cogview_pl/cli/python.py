"""One run inside this process: for the command line, and for `cogview_pl.run(...)` in a script or notebook."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cogview_pl.cli.messages import one_line
from cogview_pl.config.shipped import shipped
from cogview_pl.errors import UserError

_Result = TypeVar("_Result")
_PACKAGE = "cogview_pl"


def with_configuration(words: Sequence[str], run: Callable[[DictConfig], _Result], *, logs: bool) -> _Result:
    """Compose the configuration of overrides and hand it to `run`; Hydra's state is as before when this returns.

    `hydra.main` does the same, but it composes everything twice.

    Args:
        words: overrides, without options of the command line.
        run: gets the configuration.
        logs: whether Hydra sets up the logging of this process.

    Raises:
        UserError: the overrides ask for a sweep.
    """
    results: list[_Result] = []
    errors: list[Exception] = []

    def task(composed: DictConfig) -> None:
        try:
            params = HydraConfig.get().sweeper.get("params")
            if params:
                raise UserError(f"hydra.sweeper.params names keys to sweep ({', '.join(params)}); add -m to sweep them")
            results.append(run(composed))
        except Exception as error:  # Hydra would print a line of its own
            errors.append(error)

    with initialize_config_dir(str(shipped("conf")), version_base="1.3", job_name=_PACKAGE):
        hydra: Any = GlobalHydra.instance().hydra
        hydra.run("config", task, [*words, "hydra.mode=RUN"], with_log_configuration=logs)
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def nothing_left() -> Iterator[None]:
    """After the block the state of the process is as before: threads, determinism, environment variables, logging.

    Raises:
        UserError: what the user can mend, also where a library found it.
    """
    import torch

    threads, environment = torch.get_num_threads(), dict(os.environ)
    deterministic, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    logger, handler = logging.getLogger(_PACKAGE), logging.StreamHandler(sys.stdout)
    level, silent = logger.level, not logger.hasHandlers()
    if silent:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
        raise UserError(" ".join(message.split())) from error
    finally:
        if silent:
            logger.removeHandler(handler)
            logger.setLevel(level)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
