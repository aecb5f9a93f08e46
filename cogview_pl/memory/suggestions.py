"""Overrides that make a run need less memory, as typed on the command line, in the order in which they are tried.

First come those that keep the results (smaller batches with accumulated gradients, activation checkpointing), then
lower precision, then another kind of training, then more devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

_HALVINGS = 6
_BLOCK = "activation_checkpointing=block"
_IN_8_BITS = "optimizer=adamw_8bit"


def first_that_fits(
    sets: Iterable[str], total: Callable[[str], int | None], available: Mapping[str, int]
) -> dict[str, str]:
    """Per place the first set of overrides with which the run fits there; places where none does are missing.

    Args:
        sets: overrides, separated by spaces, in the order in which they are tried.
        total: bytes that the run needs with a set; None: the run would refuse it. It is called once per set at most.
        available: bytes of each place.
    """
    found: dict[str, str] = {}
    for overrides in sets:
        missing = [place for place in available if place not in found]
        if not missing:
            break
        size = total(overrides)
        if size is not None:
            found |= {place: overrides for place in missing if size <= available[place]}
    return found


def for_sequence_model(
    *, batch: int, batches: int, fp32: bool, checkpoints: bool, adapts: bool, on_gpu: bool
) -> list[str]:
    """Sets for training of stage 2.

    Args:
        batch, batches: sequences of a batch, and batches of a step.
        fp32: whether arithmetic is in fp32.
        checkpoints: whether the run checkpoints activations already.
        adapts: whether LoRA is possible: the run starts from weights and trains all of them.
        on_gpu: whether the run is on a GPU.
    """
    halved = _smaller_batches(batch, batches)
    block = [] if checkpoints else [_BLOCK]
    least = [*block, *halved[-1:]]
    found = [[words] for words in halved[:2]]
    if not checkpoints:
        found += [["activation_checkpointing=selective"], block]
    found.append(least)
    half = ["precision=bf16"] if fp32 and on_gpu else []
    if half:
        found += [half, [*half, *block], [*half, *least]]
    if adapts:
        found += [[*half, "lora.rank=8"], [*half, "lora.rank=8", *least]]
    if on_gpu:
        found += [[*half, _IN_8_BITS, *block], [*half, _IN_8_BITS, *least], ["precision=bf16_true", _IN_8_BITS, *least]]
        found += [[*half, "strategy=fsdp", f"trainer.devices={devices}", *least] for devices in (2, 4, 8)]
    return _joined(found)


def for_image_tokenizer(*, batch: int, batches: int, fp32: bool, on_gpu: bool) -> list[str]:
    """Sets for training of stage 1; arguments as for `for_sequence_model`."""
    halved = _smaller_batches(batch, batches)
    found = [[word] for word in halved]
    if fp32 and on_gpu:
        found += [["precision=bf16"], ["precision=bf16", *halved[-1:]]]
    return _joined(found)


def for_inference(key: str, *, batch: int, fp32: bool, quantizes: bool, on_gpu: bool) -> list[str]:
    """Sets for tasks that use trained models.

    Args:
        key: the key of the batch size.
        batch: its value.
        fp32: whether weights are in fp32.
        quantizes: whether `quantization=int8` is possible.
        on_gpu: whether the run is on a GPU.
    """
    halved = [f"{key}={size}" for size in _halves(batch)]
    found = [[word] for word in halved]
    half = ["precision=bf16"] if fp32 and on_gpu else []
    if half:
        found += [half, [*half, *halved[-1:]]]
    if quantizes:
        found += [[*half, "quantization=int8"], [*half, "quantization=int8", *halved[-1:]]]
    return _joined(found)


def _halves(size: int) -> list[int]:
    return [size >> step for step in range(1, _HALVINGS + 1) if size >> step]


def _smaller_batches(batch: int, batches: int) -> list[str]:
    """Smaller batches and more of them in a step; the gradients stay the same."""
    return [
        f"data.batch_size={size} trainer.accumulate_grad_batches={batch * batches // size}"
        for size in _halves(batch)
        if batch % size == 0
    ]


def _joined(sets: Iterable[Iterable[str]]) -> list[str]:
    """Without repetition and without the empty set."""
    return [words for words in dict.fromkeys(map(" ".join, sets)) if words]
