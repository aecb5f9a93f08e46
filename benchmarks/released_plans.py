"""Memory that the plan expects of finetunes of the released model, as the tables of experiments/cogview_4b_*_lora.

    python -m benchmarks.released_plans

Times are of one step: the operations of the plan at the share of a card's peak that an H200 was measured to reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from benchmarks.random_runs import composed
from cogview_pl.config.experiments import register_experiments
from cogview_pl.lit.callbacks.device_peaks import peak_tflops
from cogview_pl.memory.cards import card_bytes
from cogview_pl.tasks.plan import estimate

TASKS = ("style", "super_resolution", "caption")
CARDS = {24: "RTX 4090", 48: "L40S", 80: "A100"}
"""GiB of a card, and its name in the table of peaks."""

_BATCHES = (4, 8, 16, 24, 32, 48, 64, 96, 128)
_GIB = 2**30
_MEASURED = {"card": "H200", "samples": 4, "seconds": 0.58, "tokens": 1089}  # docs/memory.md, adapters of rank 16
_LENGTHS = {"style": 1089, "super_resolution": 1350, "caption": 1089}  # tokens of the longest sequence


def table() -> Iterator[str]:
    """Lines of the table."""
    yield "| recipe | card | `data.batch_size` | GiB | seconds per step |"
    yield "|---|---|---|---|---|"
    for task in TASKS:
        for card, name in CARDS.items():
            batch = max(size for size in _BATCHES if planned(task, size) <= card_bytes(card))
            cells = (f"`cogview_4b_{task}_lora`", f"{card} GB", f"{batch}", f"{planned(task, batch) / _GIB:.1f}")
            yield f"| {' | '.join(cells)} | {seconds(task, batch, name):.1f} ({name}) |"


def planned(task: str, batch: int) -> float:
    """Bytes on a GPU; a straight line through two plans, since activations are proportional to the batch."""
    first, second = (_planned(task, size) for size in _BATCHES[1:3])
    return first + (second - first) / (_BATCHES[2] - _BATCHES[1]) * (batch - _BATCHES[1])


def seconds(task: str, batch: int, name: str) -> float:
    """Time of a step on a card, in proportion to tokens and peaks."""
    ours, measured = (peak_tflops(f"NVIDIA {card}", "bf16-mixed") for card in (name, _MEASURED["card"]))
    assert ours is not None and measured is not None
    tokens = batch * _LENGTHS[task] / (_MEASURED["samples"] * _MEASURED["tokens"])
    return float(_MEASURED["seconds"] * tokens * measured / ours)


@cache
def _planned(task: str, batch: int) -> int:
    register_experiments()
    config = composed([f"experiment=cogview_4b_{task}_lora", "init_from=weights", f"data.batch_size={batch}"])
    return estimate(config, True).total


if __name__ == "__main__":
    print(*table(), sep="\n")
