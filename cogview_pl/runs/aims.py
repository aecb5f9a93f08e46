"""Aims of a recipe: values that metrics of its stages are to reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cogview_pl.limits import MISSING
from cogview_pl.runs.main_metrics import rounded


@dataclass
class Aim:
    """A bound for a metric of a stage: `at_least` or `at_most`, plus metrics of that stage times their factors."""

    stage: str = MISSING
    metric: str = MISSING
    at_least: float | None = None
    at_most: float | None = None
    plus: dict[str, float] = field(default_factory=dict)
    """Metric of the stage → factor, such as `magnify/psnr_bicubic: 1`."""


class Outcome(NamedTuple):
    """An aim, the value that the run has reached, and the bound."""

    aim: Aim
    value: float
    bound: float

    @property
    def reached(self) -> bool:
        """Whether the value is on the right side of the bound; a value that is no number never is."""
        return self.value >= self.bound if self.aim.at_least is not None else self.value <= self.bound

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """Cells of a table: stage, metric, value, bound, and whether it is reached."""
        sign = "≤" if self.aim.at_least is None else "≥"
        bound = f"{sign} {rounded(self.bound)}"
        return self.aim.stage, self.aim.metric, rounded(self.value), bound, "reached" if self.reached else "missed"


def outcomes(aims: Sequence[Aim], stages: Mapping[str, Mapping[str, float | str]]) -> list[Outcome]:
    """The aims whose metrics the stages have measured.

    Args:
        aims: aims of the recipe.
        stages: name of a stage → its metrics.
    """
    found = []
    for aim in aims:
        metrics = stages.get(aim.stage, {})
        if all(isinstance(metrics.get(name), (int, float)) for name in (aim.metric, *aim.plus)):
            base = aim.at_least if aim.at_least is not None else aim.at_most
            bound = (base or 0.0) + sum(float(metrics[name]) * factor for name, factor in aim.plus.items())
            found.append(Outcome(aim, float(metrics[aim.metric]), bound))
    return found
