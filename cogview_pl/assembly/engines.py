"""Which engine decodes each model of a run: prepared, and kept in the record of the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from cogview_pl.assembly.cpu_kernels import prepare
from cogview_pl.assembly.roles import Role
from cogview_pl.generation.config import Engine, Sampling
from cogview_pl.generation.engine.forms import engine_of, wants_compiled
from cogview_pl.kernels import cpu_decoding
from cogview_pl.kernels.cpp_library import NoLibraryError
from cogview_pl.transformer.model import Transformer

_log = logging.getLogger(__name__)


def engine_settings(models: Mapping[Role, Transformer], sampling: Sampling) -> dict[str, str]:
    """The engine of each model, such as `{"sampler.engine": "compiled"}`.

    Says where kernels are compiled, and where that is not possible and decoding takes more time.

    Args:
        models: models that decode; the first one gives `sampler.engine`.
        sampling: its `engine` is `auto`, or the one asked for.

    Raises:
        UserError: see `engine_of`.
    """
    if any(wants_compiled(model, sampling.engine) for model in models.values()):
        _prepare(sampling.engine)
    engines = {role.key: engine_of(model, sampling.engine) for role, model in models.items()}
    first, *others = engines
    named = {"sampler.engine": first, **{f"sampler.engine of {key}": key for key in others}}
    return {name: engines[key].value for name, key in named.items()}


def _prepare(engine: Engine) -> None:
    try:
        prepare(cpu_decoding.LIBRARY, "decoding")
    except NoLibraryError as error:
        if engine == Engine.auto:  # else `engine_of` says that it is an error
            _log.info("Decoding uses the kernels of torch, two to four times slower: %s.", error)
