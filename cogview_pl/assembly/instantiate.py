"""Objects that a configuration describes by `_target_`."""

from __future__ import annotations

from typing import Any

import hydra.utils
from hydra.errors import HydraException

from cogview_pl.errors import UserError


def instantiate(node: dict[str, Any], key: str) -> Any:
    """The object that a `_target_` node describes; raises UserError naming its `key` if it cannot be made."""
    try:
        return hydra.utils.instantiate(node)
    except HydraException as error:
        reason = str(error).replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", ";").strip()
        raise UserError(f"{key}: {reason}") from error
