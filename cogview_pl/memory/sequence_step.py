"""A training step of the sequence model, played through on tensors without memory.

Shapes: B sequences, L tokens that the model reads, D hidden size, N predicted tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cogview_pl.memory.devices import keep_as_on_a_cpu, keep_as_on_a_gpu
from cogview_pl.memory.model import Model
from cogview_pl.memory.trace import LiveBytes
from cogview_pl.transformer.config import ActivationCheckpointing
from cogview_pl.transformer.loss import linear_cross_entropy, rows_at_once, rows_of
from cogview_pl.transformer.model import Transformer

ACTIVATIONS, LOGITS, GRADIENTS, BATCH = "activations", "logits", "gradients", "batch"
_BATCH = (torch.long, torch.long, torch.float32, torch.long)  # tokens, positions, weights, slots
_LARGEST = 64  # sequences played through at most: the loss runs over them part by part
_DEPTH = 2  # blocks played through; all others are like the last one


class Predicted(NamedTuple):
    """Tokens of one sequence that share the ids that the loss is taken over."""

    number: int
    ids: range


@dataclass(frozen=True)
class SequenceStep:
    """What a training step is made of.

    Attributes:
        model: what trains.
        batch, tokens: B and L.
        predicted: the tokens with a loss.
        recompute: activation checkpointing, a value of `ActivationCheckpointing`.
        arithmetic: dtype of autocast (that of the weights: no autocast).
        on_gpu: count as on a GPU.
        accumulates: whether gradients of an earlier batch are there while this one runs backwards.
    """

    model: Model
    batch: int
    tokens: int
    predicted: tuple[Predicted, ...]
    recompute: str
    arithmetic: torch.dtype
    on_gpu: bool
    accumulates: bool


class Heights(NamedTuple):
    """Bytes by label on top of the weights, at the height of each part of a step."""

    forward: Counter[str]
    """Up to the loss, gradients of the step before not counted."""
    backward: Counter[str]
    """From the loss to the first block; gradients are counted as they come."""


def heights(step: SequenceStep) -> Heights:
    """Bytes at the heights of a step; those of a large batch follow the straight line through two smaller ones."""
    return Heights(*(found.copy() for found in _heights(step)))


@cache
def _heights(step: SequenceStep) -> Heights:
    if step.batch <= _LARGEST:
        return _played(step)
    one, two = (_played(replace(step, batch=batch)) for batch in (_LARGEST // 2, _LARGEST))
    factor = (step.batch - _LARGEST) / (_LARGEST - _LARGEST // 2)
    return Heights(*(_further(half, whole, factor) for half, whole in zip(one, two, strict=True)))


def _further(half: Counter[str], whole: Counter[str], factor: float) -> Counter[str]:
    return Counter({name: whole[name] + int((whole[name] - half[name]) * factor) for name in whole})


def _played(step: SequenceStep) -> Heights:
    """Play the step through with two blocks, and count the others as their like.

    The forward pass grows by what a block keeps. So does the backward pass as long as it is in the last block; when it
    reaches the first, the others have given back what they kept and hold gradients instead.
    """
    layers = step.model.layers
    depth = min(layers, _DEPTH)
    with FakeTensorMode():
        model = step.model.build(depth).train()
        model.set_activation_checkpointing(ActivationCheckpointing(step.recompute))
        if step.on_gpu:
            keep_as_on_a_gpu(model)
        else:
            keep_as_on_a_cpu(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if step.accumulates:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        with LiveBytes(ACTIVATIONS) as live:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(lambda p: live.claim(p.grad, GRADIENTS))
            kept: list[int] = []
            marks: list[Counter[str]] = []
            for block in model.blocks:
                block.register_forward_hook(lambda *_: kept.append(live.now[ACTIVATIONS]))
            if depth > 1:  # the gradient of its output is known when the pass has left the blocks behind it
                model.blocks[0].register_forward_hook(
                    lambda _, __, out: out.register_hook(lambda _: marks.append(live.restart())) and None
                )
            with live.label(BATCH):
                batch = [torch.zeros(step.batch, step.tokens + 1, dtype=dtype) for dtype in _BATCH]
            with torch.autocast("cpu", step.arithmetic, enabled=step.arithmetic != step.model.weights):
                hidden_BLD = model.hidden(batch[0][:, :-1], batch[1][:, :-1])
                with live.label(LOGITS):
                    loss = _loss(model, hidden_BLD, step)
                del hidden_BLD
                inside = live.now[ACTIVATIONS]
            casts = inside - live.now[ACTIVATIONS]  # of the blocks' weights; autocast gives back what nobody keeps
            forward = live.restart()
            loss.backward()
            first = live.restart()
    more = layers - depth
    of_a_block = kept[-1] - kept[-2] if depth > 1 else 0
    own = sum(p.numel() * p.element_size() for p in model.blocks[0].parameters() if p.requires_grad)
    forward[ACTIVATIONS] += more * of_a_block
    if not marks:
        return Heights(forward, first)
    last = marks[0]
    last[ACTIVATIONS] += more * (of_a_block - casts // depth)
    if not step.accumulates:
        first[GRADIENTS] += more * own
    return Heights(forward, max(last, first, key=lambda found: sum(found.values())))


def _loss(model: Transformer, hidden_BLD: Tensor, step: SequenceStep) -> Tensor:
    """`sequence_loss` with as many predicted tokens as are known from the layout."""
    total = torch.zeros(())
    due_N = torch.zeros(step.batch * sum(part.number for part in step.predicted), dtype=torch.long)
    hidden_ND = hidden_BLD.flatten(0, 1)[due_N]
    head_VD = model.token_embedding.weight
    device = "cuda" if step.on_gpu else "cpu"
    first = rows_at_once(device, step.arithmetic)  # the rows after them take the same memory again
    for part in step.predicted:
        rows = torch.zeros(step.batch * part.number, dtype=torch.long)
        loss, _ = linear_cross_entropy(
            hidden_ND[rows],
            rows_of(head_VD, part.ids),
            rows[:first],
            torch.zeros(len(rows))[:first],
            device,
        )
        total = total + loss
    return total
