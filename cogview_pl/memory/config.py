"""Options of the memory estimate: the schema of `conf/plan`."""

from __future__ import annotations

from dataclasses import dataclass

from cogview_pl.limits import MISSING


@dataclass
class PlanConfig:
    """The memory estimate, alone (`plan=true`) or before every training run and `generate`."""

    only: bool = MISSING
    strict: bool = MISSING
