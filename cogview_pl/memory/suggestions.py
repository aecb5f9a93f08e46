"""Overrides that make a run need less memory, as typed on the command line, in the order in which they are tried.

First come those that keep the results (no copy of checkpoints, sharding over the devices of the run, smaller batches
with accumulated gradients, activation checkpointing), then lower precision, then another kind of training, then more
devices. On a GPU a large model gets bf16 first, since in fp32 it would take a multiple of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from cogview_pl.assembly.options import TrainingOptions
from cogview_pl.assembly.strategy import num_devices

_HALVINGS = 6
_IN_8_BITS = "optimizer=adamw_8bit"
_AT_ONCE = "callbacks.checkpoint.background_mb=null"
_MORE = (2, 4, 8)  # times the devices that the run has
_NOT_SHARDED = ("16-mixed", "bf16-true")  # a loss scaler, or an optimizer, needs full tensors


Family = list[str]
"""Sets of overrides, separated by spaces, in the order in which they are tried; the last one needs the least memory."""


def first_that_fits(
    families: Iterable[Family], total: Callable[[str], int | None], available: Mapping[str, int]
) -> dict[str, str]:
    """Per place the first set of overrides with which the run fits there; places where none does are missing.

    A family is tried only where the set that needs the least fits, because an estimate takes a second.

    Args:
        families: sets of overrides.
        total: bytes that the run needs with a set; None: the run would refuse it.
        available: bytes of each place.
    """
    found: dict[str, str] = {}
    for *others, least in filter(None, families):
        missing = [place for place in available if place not in found]
        if not missing:
            break
        needed = total(least)
        if needed is not None:
            missing = [place for place in missing if needed <= available[place]]
        for overrides in [*others, least] if missing else []:
            size = total(overrides)
            if size is not None:
                found |= {place: overrides for place in missing if place not in found and size <= available[place]}
    return found


def for_training(
    options: TrainingOptions,
    batch: int,
    *,
    sequences: bool,
    checkpoints: bool,
    copies: bool,
    on_gpu: bool,
    large: bool,
) -> list[Family]:
    """Sets for training.

    Args:
        options: of the run.
        batch: samples of a batch.
        sequences: whether the sequence model is trained.
        checkpoints: whether activation checkpointing can be turned on.
        copies: whether the memory holds a copy of each checkpoint.
        on_gpu: whether the run is on a GPU.
        large: whether the model has a billion weights or more.
    """
    samples = batch * options.trainer["accumulate_grad_batches"]
    halved = [
        f"data.batch_size={size} trainer.accumulate_grad_batches={samples // size}"
        for size in _halves(batch)
        if batch % size == 0  # then the gradients stay the same
    ]
    block = ["activation_checkpointing=block"] if checkpoints else []
    copyless = [_AT_ONCE] if copies else []
    least = [*block, *halved[-1:], *copyless]
    half = ["precision=bf16"] if on_gpu and options.precision["precision"] == "32-true" else []
    selective = [["activation_checkpointing=selective"], block] if block else []
    shards = on_gpu and sequences
    first = half if large else []
    families: list[list[list[str]]] = [[[*first, *copyless]], [[*first, *_shard_here(options)] if shards else []]]
    families.append([[*first, *words] for words in (*([words] for words in halved[:2]), *selective, least)])
    families.append([half, [*half, *block], [*half, *least]] if half and not first else [])
    if sequences and options.starts_from_weights and not options.lora.rank:
        families.append([[*half, "lora.rank=8"], [*half, "lora.rank=8", *least]])
    if on_gpu:
        families.append([[*half, _IN_8_BITS, *block], [*half, _IN_8_BITS, *least]])
    if shards:
        families.append([["precision=bf16_true", _IN_8_BITS, *least]])
        families += _on_devices(options, half, block, least)
    return [_joined(family) for family in families]


def _shard_here(options: TrainingOptions) -> list[str]:
    """Words for FSDP on the devices that a run has; none if it has one device, or shards already."""
    if num_devices(options.trainer) == 1 or options.strategy.kind.sharded:
        return []
    needs_bf16 = options.precision["precision"] in _NOT_SHARDED
    return [*(["precision=bf16"] if needs_bf16 else []), "strategy=fsdp"]


def _on_devices(
    options: TrainingOptions, half: list[str], block: list[str], least: list[str]
) -> Iterator[list[list[str]]]:
    """Sets with FSDP on the devices that a run has, and on more of them."""
    here = _shard_here(options)
    if here:
        yield [[*half, *here, *block], [*half, *here, *least]]
        if not str(options.optimizer.optimizer.get("_target_")).startswith("torch."):  # it may need full tensors
            yield [[*half, *here, "optimizer=adamw", *block], [*half, *here, "optimizer=adamw", *least]]
    nodes = int(options.trainer.get("num_nodes", 1))
    for times in _MORE:
        devices = f"trainer.devices={num_devices(options.trainer) // nodes * times}"
        yield [[*half, *(here or ["strategy=fsdp"]), devices, *least]]


def for_inference(
    key: str,
    batch: int,
    *,
    halves: bool = False,
    quantizes: bool = False,
    divides: Iterable[str] = (),
    large: bool = False,
) -> list[Family]:
    """Sets for tasks that use trained models.

    Args:
        key, batch: the key of the batch size, and its value.
        halves, quantizes: whether `precision=bf16` and `quantization=int8` are possible.
        divides: see `tensor_parallel`.
        large: whether the model has a billion weights or more.
    """
    halved = [[f"{key}={size}"] for size in _halves(batch)]
    least, half = halved[-1] if halved else [], ["precision=bf16"] if halves else []
    families = [[half, [*half, *least]] if halves else []]
    families.insert(1 if large else 0, halved)
    if quantizes:
        families.append([[*half, "quantization=int8"], [*half, "quantization=int8", *least]])
    families += [[[*half, words], [*half, words, *least]] for words in divides]
    return [_joined(family) for family in families]


def tensor_parallel(trainer: Mapping[str, Any], num_heads: int) -> list[str]:
    """Overrides that divide a model among the devices of a run, and among more, where its heads can be divided."""
    nodes = int(trainer.get("num_nodes", 1))
    each = num_devices(trainer) // nodes
    counts = [each * times for times in (1, *_MORE)]
    fits = [count for count in counts if count * nodes > 1 and num_heads % (count * nodes) == 0]
    return ["strategy=tp" if count == each else f"strategy=tp trainer.devices={count}" for count in fits]


def _halves(size: int) -> list[int]:
    return [size >> step for step in range(1, _HALVINGS + 1) if size >> step]


def _joined(sets: Iterable[Iterable[str]]) -> list[str]:
    """Without repetition and without the empty set."""
    return [words for words in dict.fromkeys(map(" ".join, sets)) if words]
