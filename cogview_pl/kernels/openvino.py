"""OpenVINO (extra `cpu`): imported where the key `sampler.engine` asks for it or may choose it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import cache
from typing import Any

from cogview_pl.errors import UserError


@cache
def openvino_version() -> str | None:
    """Version of the installed OpenVINO, which this does not import; None if it is missing."""
    try:
        return importlib.metadata.version("openvino") if importlib.util.find_spec("openvino") else None
    except importlib.metadata.PackageNotFoundError:
        return None


def import_openvino() -> Any:
    """The module `openvino`; raises UserError if it is missing."""
    if openvino_version() is None:
        raise UserError('sampler.engine=openvino needs OpenVINO; pip install "cogview_pl[cpu]"')
    import openvino

    return openvino
