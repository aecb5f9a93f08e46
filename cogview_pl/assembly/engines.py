"""Which engine decodes each model of a run: prepared, and kept in the record of the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from cogview_pl.assembly.roles import Role
from cogview_pl.generation.config import Engine, Sampling
from cogview_pl.generation.engine.compiled_cpu import can_compile
from cogview_pl.generation.engine.forms import engine_of
from cogview_pl.kernels import cpu_decoding
from cogview_pl.kernels.cpp_library import NoLibraryError
from cogview_pl.lit.bars import status
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
    if sampling.engine != Engine.torch and any(map(can_compile, models.values())):
        _say_what_happens()
    engines = {role.key: engine_of(model, sampling.engine) for role, model in models.items()}
    first, *others = engines
    named = {"sampler.engine": first, **{f"sampler.engine of {key}": key for key in others}}
    return {name: engines[key].value for name, key in named.items()}


def _say_what_happens() -> None:
    try:
        if not cpu_decoding.prepared():
            status("compiling the decoding kernels …")
    except NoLibraryError as error:
        _log.info("Decoding uses the kernels of torch, two to four times slower: %s.", error)
