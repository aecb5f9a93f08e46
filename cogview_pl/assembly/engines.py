"""Which engine decodes each model of a run: said once, and kept in the record of the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from cogview_pl.assembly.roles import Role
from cogview_pl.generation.config import Engine, Sampling
from cogview_pl.generation.engine.forms import engine_of
from cogview_pl.kernels.openvino import openvino_version
from cogview_pl.transformer.model import Transformer

_log = logging.getLogger(__name__)


def engine_settings(models: Mapping[Role, Transformer], sampling: Sampling) -> dict[str, str]:
    """The engine of each model, such as `{"sampler.engine": "openvino"}`; says where it is OpenVINO.

    Args:
        models: models that decode; the first one gives `sampler.engine`.
        sampling: its `engine` is `auto`, or the one asked for.

    Raises:
        UserError: see `engine_of`.
    """
    engines = {role.key: engine_of(model, sampling.engine) for role, model in models.items()}
    by_openvino = [key for key, engine in engines.items() if engine == Engine.openvino]
    if by_openvino:
        _log.info("OpenVINO %s decodes the model of %s", openvino_version(), " and ".join(by_openvino))
    first, *others = engines
    named = {"sampler.engine": first, **{f"sampler.engine of {key}": key for key in others}}
    return {name: engines[key].value for name, key in named.items()}
