"""The estimate in words: one sentence with the verdict, a table of parts, a line per card, the sizes of the models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cogview_pl.memory.cards import CARDS, Device
from cogview_pl.memory.phases import Estimate

_MIB, _GIB = 2**20, 2**30
_WIDTH = 38  # of the first column
_NAMES = {
    "kv_cache": "KV cache",
    "packed_weights": "packed copy of the weights",
    "optimizer": "optimizer state",
    "averages": "averages of the weights",
    "checkpoint_copy": "copy of the checkpoint",
    "base_in_fp32": "frozen weights in fp32",
    "workspace": "cuBLAS workspace",
}
"""Names of parts that differ from their keys."""


@dataclass(frozen=True)
class Plan:
    """What `plan=true` prints.

    Attributes:
        figures: flat, as metrics are.
        device: of this machine.
        here, gpu: estimates for that device and for a GPU; the same where the device is a GPU.
        devices: number of devices of the run.
        advice: for each place where the run does not fit (the device, or `80 GB`), overrides with which it fits.
    """

    figures: Mapping[str, float]
    device: Device
    here: Estimate
    gpu: Estimate
    devices: int
    advice: Mapping[str, str]


def verdict(estimate: Estimate, device: Device, advice: str | None) -> str:
    """One sentence: what the run needs, whether it fits on this machine, and with which overrides it does."""
    needs, on = f"this run needs {estimate.total / _GIB:.2f} GiB", f"{device.name} ({device.free / _GIB:.2f} GiB free)"
    if estimate.total <= device.free:
        return f"{needs} and fits on {on}"
    return f"{needs} and does not fit on {on}; {_advice(advice)}"


def print_plan(plan: Plan) -> None:
    """Print the verdict, memory by part, what fits on which card, and the sizes of the models."""
    sentence = verdict(plan.here, plan.device, plan.advice.get(plan.device.name))
    sizes = [name for name in plan.figures if not name.startswith(("memory", "fits/"))]
    print(f"{sentence[0].upper()}{sentence[1:]}.", "", *_parts(plan), "", *_cards(plan), "", sep="\n")
    print(*(f"{name:{_WIDTH}}{_readable(plan.figures[name])}" for name in sizes), sep="\n")


def _parts(plan: Plan) -> list[str]:
    """One row per part at the peak, largest first, for this machine and for a GPU; parts that print as 0.00 are out."""
    columns = {"this machine": plan.here} | ({} if plan.device.on_gpu else {"a GPU": plan.gpu})
    unit, name = (_GIB, "GiB") if max(estimate.total for estimate in columns.values()) >= _GIB else (_MIB, "MiB")
    parts = {part for estimate in columns.values() for part in estimate.peak}
    sizes = {_NAMES.get(part, part.replace("_", " ")): [e.peak[part] for e in columns.values()] for part in parts}
    rows = sorted(((max(found), part) for part, found in sizes.items() if max(found) >= 0.005 * unit), reverse=True)
    sizes["total"] = [estimate.total for estimate in columns.values()]
    each = f", each of {plan.devices} devices" if plan.devices > 1 else ""
    lines = [f"{f'Memory at the peak, {name}{each}':{_WIDTH}}" + "".join(f"{column:>14}" for column in columns)]
    for part in [*(part for _, part in rows), "total"]:
        lines.append(f"{'  ' + part:{_WIDTH}}" + "".join(f"{size / unit:14.2f}" for size in sizes[part]))
    peaks = dict.fromkeys(estimate.peak_phase for estimate in columns.values())
    on = " (this machine) and in the ".join(peaks) + (" (a GPU)" if len(peaks) > 1 else "")
    return [*lines, f"The peak is reached in the {on}."]


def _cards(plan: Plan) -> list[str]:
    """A line for cards that share an advice, then the cards on which the run fits."""
    lines: dict[str, list[str]] = {}
    for card in CARDS:
        fits = plan.figures[f"fits/{card}_GB"]
        says = "the run fits" if fits else f"the run does not fit; {_advice(plan.advice.get(f'{card} GB'))}"
        lines.setdefault(says, []).append(f"{card} GB")
    return ["On one GPU (a card of 80 GB has 80 GiB):", *(f"  {', '.join(on)}: {says}" for says, on in lines.items())]


def _advice(overrides: str | None) -> str:
    return f"it fits with `{overrides}`" if overrides else "none of the usual overrides makes it fit"


def _readable(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value:,.0f} ({value / size:.2f} {unit})"
    return f"{value:,.0f}"
