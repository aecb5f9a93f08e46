"""The plan as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cogview_pl.memory.cards import CARDS
from cogview_pl.memory.phases import Moments

_GIB = 2**30
_WORDS = {"kv_cache": "KV cache", "packed_weights": "packed copy of the weights", "optimizer": "optimizer state"}


@dataclass(frozen=True)
class Plan:
    """What a plan found."""

    figures: Mapping[str, float]
    """Flat, as metrics are."""
    machine: str
    on_gpu: bool
    free: int
    """Bytes that a run can use here."""
    here: Moments
    gpu: Moments
    devices: int
    advice: Mapping[str, str]
    """Where it does not fit, the overrides with which it does; empty where there are none."""


def print_plan(plan: Plan) -> None:
    """Figures, memory by part, what fits."""
    print(_figures(plan.figures))
    print()
    print(_parts(plan))
    print()
    print(_verdicts(plan))


def _figures(figures: Mapping[str, float]) -> str:
    shown = {name: value for name, value in figures.items() if not name.startswith(("memory", "fits/"))}
    width = max(map(len, shown))
    return "\n".join(f"{name:{width}}  {_readable(value)}" for name, value in shown.items())


def _parts(plan: Plan) -> str:
    """One row per part, of the worst moment, on this machine and on a GPU."""
    columns = {"this machine": plan.here} if plan.on_gpu else {"this machine": plan.here, "on a GPU": plan.gpu}
    per = f" on each of {plan.devices} devices" if plan.devices > 1 else ""
    sizes = {part: [m.peak[part] for m in columns.values()] for m in columns.values() for part in m.peak}
    lines = [f"{'memory, GiB' + per:34}" + "".join(f"{name:>16}" for name in columns)]
    for part, found in sorted(sizes.items(), key=lambda row: -max(row[1])):
        name = _WORDS.get(part, part.replace("_", " "))
        lines.append(f"  {name:32}" + "".join(f"{size / _GIB:16.3f}" for size in found))
    lines.append(f"  {'at the height':32}" + "".join(f"{moments.total / _GIB:16.3f}" for moments in columns.values()))
    lines += [f"  highest in the {moments.worst} ({name})" for name, moments in columns.items()]
    return "\n".join(lines)


def _verdicts(plan: Plan) -> str:
    fits = {plan.machine: plan.figures["fits/here"]} | {f"{card} GB": plan.figures[f"fits/{card}_GB"] for card in CARDS}
    lines = []
    for name, value in fits.items():
        if value:
            verdict = "fits"
        elif plan.advice.get(name):
            verdict = f"does not fit; with {plan.advice[name]} it does"
        else:
            verdict = "does not fit, with none of the overrides that were tried"
        free = f" ({plan.free / _GIB:.1f} GiB to give)" if name == plan.machine else ""
        lines.append(f"{name + free:34}  {verdict}")
    return "\n".join(lines)


def _readable(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value:,.0f}  ({value / size:.2f} {unit})"
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"
