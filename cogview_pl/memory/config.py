"""Options of the memory estimate: the schema of `conf/plan`."""

from __future__ import annotations

from dataclasses import dataclass

from cogview_pl.limits import MISSING


@dataclass
class PlanConfig:
    """The estimate of memory: `plan=true` for nothing else, else before every fit and generate."""

    only: bool = MISSING
    strict: bool = MISSING
    bench: str = MISSING
