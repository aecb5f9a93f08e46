"""The estimate in words: one sentence with the verdict, a table of parts, a line per card. Memory is in GiB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cogview_pl.memory.cards import CARDS
from cogview_pl.memory.phases import Estimate

_GIB = 2**30
_NAMES = {
    "kv_cache": "KV cache",
    "packed_weights": "packed copy of the weights",
    "optimizer": "optimizer state",
    "base_in_fp32": "frozen weights in fp32",
    "workspace": "cuBLAS workspace",
}
"""Names of parts that differ from their keys."""


@dataclass(frozen=True)
class Plan:
    """What `plan=true` prints.

    Attributes:
        figures: flat, as metrics are.
        machine: name of the device of this machine.
        on_gpu: whether that is a GPU.
        free: bytes that a run can use on it.
        here, gpu: estimates for this machine and for a GPU; the same where this machine has one.
        devices: number of devices of the run.
        advice: for each place where the run does not fit (`machine`, or `80 GB`), overrides with which it fits.
    """

    figures: Mapping[str, float]
    machine: str
    on_gpu: bool
    free: int
    here: Estimate
    gpu: Estimate
    devices: int
    advice: Mapping[str, str]


def verdict(estimate: Estimate, machine: str, free: int, advice: str | None) -> str:
    """One sentence: what the run needs, whether it fits on this machine, and with which overrides it does."""
    needs, has = f"this run needs {estimate.total / _GIB:.2f} GiB", f"{machine} ({free / _GIB:.2f} GiB free)"
    if estimate.total <= free:
        return f"{needs} and fits on {has}"
    return f"{needs} and does not fit on {has}; {_advice(advice)}"


def print_plan(plan: Plan) -> None:
    """Print the verdict, memory by part, what fits on which card, and the sizes of the models."""
    sentence = verdict(plan.here, plan.machine, plan.free, plan.advice.get(plan.machine))
    print(f"{sentence[0].upper()}{sentence[1:]}.\n")
    print(f"{_parts(plan)}\n\n{_cards(plan)}\n\n{_sizes(plan.figures)}")


def _parts(plan: Plan) -> str:
    """One row per part at the peak, largest first, for this machine and for a GPU."""
    columns = {"this machine": plan.here} if plan.on_gpu else {"this machine": plan.here, "a GPU": plan.gpu}
    devices = f", each of {plan.devices} devices" if plan.devices > 1 else ""
    parts = dict.fromkeys(part for estimate in columns.values() for part in estimate.peak)
    rows = {part: [estimate.peak[part] / _GIB for estimate in columns.values()] for part in parts}
    lines = [_row(f"Memory at the peak, GiB{devices}", [f"{name:>14}" for name in columns])]
    for part, sizes in sorted(rows.items(), key=lambda row: -max(row[1])):
        if max(sizes) >= 0.005:  # smaller ones would print as 0.00
            lines.append(_row(f"  {_NAMES.get(part, part.replace('_', ' '))}", [f"{size:14.2f}" for size in sizes]))
    lines.append(_row("  total", [f"{estimate.total / _GIB:14.2f}" for estimate in columns.values()]))
    peaks = {f"{name}: {estimate.peak_phase}" for name, estimate in columns.items()}
    if len({estimate.peak_phase for estimate in columns.values()}) == 1:
        return "\n".join([*lines, f"The peak is reached in the {plan.here.peak_phase}."])
    return "\n".join([*lines, f"The peak is reached in these phases: {', '.join(sorted(peaks))}."])


def _cards(plan: Plan) -> str:
    """A line per card; neighbours with the same verdict share it."""
    lines = ["A GPU with"]
    for card in CARDS:
        name = f"{card} GB"
        fits = plan.figures[f"fits/{card}_GB"]
        lines.append(f"{name:>9}  {'fits' if fits else 'does not fit; ' + _advice(plan.advice.get(name))}")
    return "\n".join(lines)


def _advice(overrides: str | None) -> str:
    return f"it fits with `{overrides}`" if overrides else "none of the usual overrides makes it fit"


def _sizes(figures: Mapping[str, float]) -> str:
    shown = {name: value for name, value in figures.items() if not name.startswith(("memory", "fits/"))}
    return "\n".join(f"{name:38}{_readable(value)}" for name, value in shown.items())


def _row(name: str, cells: list[str]) -> str:
    return f"{name:38}{''.join(cells)}"


def _readable(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value:,.0f} ({value / size:.2f} {unit})"
    return f"{value:,.0f}"
