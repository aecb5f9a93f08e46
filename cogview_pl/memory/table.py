"""The estimate in words: one sentence with the verdict, a table of parts, a line per card. Memory is in GiB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cogview_pl.memory.cards import CARDS, Device
from cogview_pl.memory.phases import Estimate

_GIB = 2**30
_SHOWN = 0.005 * _GIB  # smaller parts would print as 0.00
_WIDTH = 38  # of the first column
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
    print(f"{sentence[0].upper()}{sentence[1:]}.\n")
    print(f"{_parts(plan)}\n\n{_cards(plan)}\n\n{_sizes(plan.figures)}")


def _parts(plan: Plan) -> str:
    """One row per part at the peak, largest first, for this machine and for a GPU."""
    columns = {"this machine": plan.here} | ({} if plan.device.on_gpu else {"a GPU": plan.gpu})
    parts = {part for estimate in columns.values() for part in estimate.peak}
    sizes = {part: [estimate.peak[part] for estimate in columns.values()] for part in parts}
    each = f", each of {plan.devices} devices" if plan.devices > 1 else ""
    lines = [f"{f'Memory at the peak, GiB{each}':{_WIDTH}}" + "".join(f"{name:>14}" for name in columns)]
    for part, found in sorted(sizes.items(), key=lambda row: -max(row[1])):
        if max(found) >= _SHOWN:
            lines.append(_row(_NAMES.get(part, part.replace("_", " ")), found))
    lines.append(_row("total", [estimate.total for estimate in columns.values()]))
    peaks = dict.fromkeys(estimate.peak_phase for estimate in columns.values())
    on = " (this machine) and in the ".join(peaks) + (" (a GPU)" if len(peaks) > 1 else "")
    return "\n".join([*lines, f"The peak is reached in the {on}."])


def _row(name: str, sizes: list[int]) -> str:
    return f"{'  ' + name:{_WIDTH}}" + "".join(f"{size / _GIB:14.2f}" for size in sizes)


def _cards(plan: Plan) -> str:
    """A line per card on which the run does not fit, then the cards on which it fits."""
    lines = ["On one GPU (a card of 80 GB has 80 GiB):"]
    fits = {f"{card} GB": bool(plan.figures[f"fits/{card}_GB"]) for card in CARDS}
    lines += [f"  {name:>6}  does not fit; {_advice(plan.advice.get(name))}" for name in fits if not fits[name]]
    return "\n".join([*lines, f"  fits on {', '.join(name for name in fits if fits[name]) or 'none of these cards'}"])


def _advice(overrides: str | None) -> str:
    return f"it fits with `{overrides}`" if overrides else "none of the usual overrides makes it fit"


def _sizes(figures: Mapping[str, float]) -> str:
    shown = {name: value for name, value in figures.items() if not name.startswith(("memory", "fits/"))}
    return "\n".join(f"{name:{_WIDTH}}{_readable(value)}" for name, value in shown.items())


def _readable(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value:,.0f} ({value / size:.2f} {unit})"
    return f"{value:,.0f}"
