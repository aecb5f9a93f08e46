"""Memory of training: one whole step, played on fake tensors.

The step runs the project's own code in `FakeTensorMode`: forward pass, backward pass, optimizer. Fake tensors have
shapes and no memory, so a step of any size takes a second. Fake tensors of a GPU need a GPU, so the step is played on
fake tensors of the CPU; for the estimate of a GPU `_behave_as_on_gpu` changes what differs there.

Shapes: B sequences, L tokens that the model reads, D hidden size, N predicted tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from cogview_pl.data.sequence_dataset import SequenceBatch, SequenceCollator
from cogview_pl.kernels.cpu_linear import Linear
from cogview_pl.memory.phases import (
    ACTIVATIONS,
    AVERAGES,
    BACKWARD,
    BATCH,
    FORWARD,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    OPTIMIZER_STEP,
    UPDATE,
    WEIGHTS,
    Phases,
)
from cogview_pl.memory.trace import LiveBytes, plain_tensors
from cogview_pl.transformer.attention import fused_attention
from cogview_pl.transformer.block import Attention, LayerNorm
from cogview_pl.transformer.loss import linear_cross_entropy, rows_at_once, rows_of
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template
from cogview_pl.vqvae.adversarial import AdversarialLoss
from cogview_pl.vqvae.config import ImageTokenizerConfig, TrainedPart
from cogview_pl.vqvae.losses import reconstruction_loss
from cogview_pl.vqvae.model import VQVAE
from cogview_pl.vqvae.perceptual import PerceptualLoss

OptimizerBuilder = Callable[[Sequence[dict[str, Any]]], Optimizer]
"""Parameter groups -> optimizer; groups of linear maps and filters are marked `matrices`."""

_BATCH_DTYPES = (torch.long, torch.long, torch.float32, torch.long)  # tokens, positions, weights, slots
_LATER_BLOCKS = "backward pass up to the first block"
_DEPTH = 2  # blocks of the smaller of the two models that are played
_TABLE_SIZE = 4096  # elements of the smallest tensor whose optimizer state torchao holds in 8 bits


@dataclass(frozen=True)
class StepOptions:
    """How a training step runs.

    Attributes:
        optimizer: makes the optimizer; None: it holds its state in the memory of the host.
        autocast: dtype of autocast; None: no autocast.
        accumulates: whether a step has several batches, so that gradients are there when a batch begins.
        frees_gradients: whether each gradient is freed as soon as it is made (`optimizer=adamw_offload`).
        compiled: whether torch.compile runs the blocks of a sequence model. Each then keeps a (B, L, D) tensor less:
            the backward pass computes the scaled input of a LayerNorm anew.
        averaged: whether there is a moving average of each trained weight, in fp32.
        on_gpu: count what a GPU allocates.
    """

    optimizer: OptimizerBuilder | None
    autocast: torch.dtype | None = None
    accumulates: bool = False
    frees_gradients: bool = False
    compiled: bool = False
    averaged: bool = False
    on_gpu: bool = False


class Predicted(NamedTuple):
    """Tokens of one sequence that share the ids that the loss is taken over."""

    number: int
    ids: range


class BatchSize(NamedTuple):
    """B sequences of L tokens, and the tokens of each that have a loss."""

    sequences: int
    tokens: int
    predicted: tuple[Predicted, ...]


def longest_batch(template: Template) -> SequenceBatch:
    """The longest training sequence of a layout; its ids mean nothing."""
    sequence = template.build({slot.name: [0] * slot.length for slot in template.slots})
    return SequenceCollator(template.vocabulary.pad)([sequence])


def longest_sequences(template: Template, slot_ids: Sequence[range] | None, sequences: int) -> BatchSize:
    """A batch of the longest sequences of a layout; `slot_ids` as for `sequence_loss`."""
    batch = longest_batch(template)
    due, slots = batch.weights[0, 1:] > 0, batch.slots[0, 1:]
    predicted = [Predicted(int((due & (slots == slot)).sum()), ids) for slot, ids in enumerate(slot_ids or [])]
    if slot_ids is None:
        predicted = [Predicted(int(due.sum()), range(template.vocabulary.size))]
    return BatchSize(sequences, template.length - 1, tuple(predicted))


def block_bytes(build: Callable[[int], Transformer]) -> int:
    """Bytes of the weights of one block; `build` as for `sequence_step`."""
    with torch.device("meta"):
        return sum(parameter.nbytes for parameter in build(1).blocks[0].parameters())


def sequence_step(build: Callable[[int], Transformer], layers: int, batch: BatchSize, options: StepOptions) -> Phases:
    """Play a step of the sequence model with two blocks and with three; each further block takes as much as the third.

    Up to three blocks are played as they are.

    Args:
        build: makes the model as one device trains it, of a number of blocks.
        layers: blocks of the whole model.
        batch: the sequences.
        options: how the step runs.

    Returns:
        Bytes by phase and part.
    """
    stream = 0

    def loss(model: Transformer, live: LiveBytes) -> Tensor:
        nonlocal stream  # bytes of the residual stream, which has the dtype of the weights under autocast too
        stream = batch.sequences * batch.tokens * model.position_embedding.weight[0].nbytes
        with live.label(BATCH):
            tensors = [torch.zeros(batch.sequences, batch.tokens + 1, dtype=dtype) for dtype in _BATCH_DTYPES]
        due_N = torch.zeros(batch.sequences * sum(part.number for part in batch.predicted), dtype=torch.long)
        hidden_ND = model.hidden(tensors[0][:, :-1], tensors[1][:, :-1]).flatten(0, 1)[due_N]
        with live.label(LOGITS):
            return _sequence_loss(model, hidden_ND, batch, options)

    phases = _play(partial(build, min(layers, _DEPTH + 1)), loss, options)
    if layers > _DEPTH + 1:
        few = _play(partial(build, _DEPTH), loss, options)
        phases = {
            name: Counter(
                {part: few[name][part] + (layers - _DEPTH) * (size - few[name][part]) for part, size in parts.items()}
            )
            for name, parts in phases.items()
        }
    if options.compiled:
        for name in (FORWARD, _LATER_BLOCKS):
            phases[name][ACTIVATIONS] -= layers * stream
    later = phases.pop(_LATER_BLOCKS)  # the backward pass peaks in the last block or in the first one
    phases[BACKWARD] = max(phases[BACKWARD], later, key=Counter.total)
    return phases


def image_tokenizer_step(
    build: Callable[[], VQVAE],
    batch: int,
    edge: int,
    tokenizer: ImageTokenizerConfig,
    options: StepOptions,
    perceptual: Callable[[], PerceptualLoss] | None = None,
) -> Phases:
    """Play a step of the image tokenizer and its codebook, and of the discriminator if there is one.

    Args:
        build: makes the model.
        batch, edge: number of images, and their pixels along an edge.
        tokenizer: losses, and the part that is trained.
        options: how the step runs.
        perceptual: makes the perceptual loss; None: there is none.

    Returns:
        Bytes by phase and part.
    """

    def networks() -> _Networks:
        return _Networks(build(), tokenizer, perceptual)

    def loss(networks: _Networks, live: LiveBytes) -> Tensor:
        with live.label(BATCH):
            uint8_images = torch.zeros(batch, 3, edge, edge, dtype=torch.uint8)
        images = (uint8_images.float() / 255).contiguous(memory_format=torch.channels_last)
        output = networks.model(images)
        error = reconstruction_loss(tokenizer.reconstruction, output.reconstruction, images)
        if networks.perceptual is not None:
            error = error + networks.perceptual(images, output.reconstruction)
        total: Tensor = error + output.quantized.loss
        if networks.adversarial is not None:
            last = networks.model.decoder[-1].weight
            terms = networks.adversarial(images, output.reconstruction, error, last, join=lambda mean: mean, scale=1.0)
            total = total + terms.tokenizer + terms.discriminator
        return total

    return _play(networks, loss, options)


class _Networks(nn.Module):
    """The image tokenizer as it trains, with the networks of its losses."""

    def __init__(
        self, model: VQVAE, tokenizer: ImageTokenizerConfig, perceptual: Callable[[], PerceptualLoss] | None
    ) -> None:
        super().__init__()
        self.model = model
        self.perceptual = None if perceptual is None else perceptual()
        self.adversarial = None if tokenizer.adversarial is None else AdversarialLoss(tokenizer.adversarial)
        if tokenizer.trained_part == TrainedPart.decoder:
            model.freeze_codes()


def _play(build: Callable[[], Any], loss: Callable[[Any, LiveBytes], Tensor], options: StepOptions) -> Phases:
    """Bytes by phase and part of the second step of a run, when gradients and optimizer state exist already."""
    if options.optimizer is not None:
        _warm_up(options.optimizer)
    phases: Phases = {}
    with FakeTensorMode(), LiveBytes(WEIGHTS) as live:
        model = build().train()
        if options.on_gpu:
            _behave_as_on_gpu(model)
        trained = _trained(model)
        with live.label(AVERAGES):
            of_model = trained if isinstance(model, Transformer) else _trained(model.model)
            averages = [parameter.detach().float().clone() for parameter in of_model if options.averaged]
        with live.label(GRADIENTS):
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        with live.label(OPTIMIZER):
            optimizer, states = _after_first_step(model, options)
        if options.frees_gradients:
            model.zero_grad()

        def gradient_made(parameter: Tensor) -> None:
            live.claim(parameter.grad, GRADIENTS)  # type: ignore[arg-type]
            if options.frees_gradients:
                parameter.grad = None

        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(gradient_made)
        if isinstance(model, Transformer):  # the later blocks are done when the gradient of the first one's output is
            model.blocks[0].register_forward_hook(
                lambda _, __, out: out.register_hook(lambda _: phases.update({_LATER_BLOCKS: live.restart()})) and None
            )
        live.restart()
        with live.label(ACTIVATIONS):
            with torch.autocast("cpu", options.autocast, enabled=options.autocast is not None):
                value = loss(model, live)
            phases[FORWARD] = live.restart()
            if not options.accumulates:
                model.zero_grad()
                live.restart()
            value.backward()
            phases[BACKWARD] = live.restart()
        if optimizer is not None:
            with live.label(OPTIMIZER_STEP):
                optimizer.step()
            phases[UPDATE] = live.restart()
        del averages, states  # they were there in all phases
    return phases


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _after_first_step(model: Transformer | _Networks, options: StepOptions) -> tuple[Optimizer | None, list[Tensor]]:
    """The optimizer with its state, and state of parameters that it does not step.

    An optimizer that updates tensors one by one takes as much memory for one tensor of each shape. Hundreds of steps of
    torchao's take seconds even on fake tensors.
    """
    if options.optimizer is None:
        return None, []
    optimizer, twins = options.optimizer(parameter_groups(model)), list[tuple[Tensor, int]]()
    if getattr(optimizer, "one_by_one", False):
        for group in optimizer.param_groups:
            of_shape: dict[Any, list[Tensor]] = {}
            for parameter in group["params"]:
                of_shape.setdefault((*parameter.shape, parameter.dtype), []).append(parameter)
            group["params"] = [same[0] for same in of_shape.values()]
            twins += [(same[0], len(same) - 1) for same in of_shape.values()]
    optimizer.step()
    states = [torch.empty_like(part) for one, number in twins for _ in range(number)
              for part in plain_tensors(optimizer.state[one])]  # fmt: skip
    return optimizer, states


def _warm_up(build: OptimizerBuilder) -> None:
    """Take one real step on a small tensor: torchao then makes its tables, which need values."""
    parameter = nn.Parameter(torch.zeros(_TABLE_SIZE))
    parameter.grad = torch.zeros_like(parameter)
    build([{"params": [parameter], "weight_decay": 0.0, "matrices": False}]).step()


def parameter_groups(model: Transformer | _Networks) -> list[dict[str, Any]]:
    """Linear maps and filters, and all other trained parameters, as an optimizer gets them."""
    if isinstance(model, Transformer):
        matrices, tables, vectors = model.parameter_groups()
        groups = [matrices, [*tables, *vectors]]
    else:
        filters = [p for p in model.model.parameters() if p.ndim == 4]
        vectors = [p for p in model.model.parameters() if p.ndim != 4]
        theirs = [] if model.adversarial is None else model.adversarial.parameters()
        groups = [filters, [*vectors, *theirs]]
    return [
        {"params": [p for p in group if p.requires_grad], "weight_decay": 0.0, "matrices": matrices}
        for group, matrices in zip(groups, (True, False), strict=True)
    ]


def _sequence_loss(model: Transformer, hidden_ND: Tensor, batch: BatchSize, options: StepOptions) -> Tensor:
    """`sequence_loss` for numbers of predicted tokens that are known from the layout: fake tensors have no values."""
    device = "cuda" if options.on_gpu else "cpu"
    total = torch.zeros(())
    head_VD = model.token_embedding.weight
    first = rows_at_once(device, options.autocast or hidden_ND.dtype)  # later rows use the memory of the first
    heads = rows_of(head_VD, [part.ids for part in batch.predicted])
    for part, head_nD in zip(batch.predicted, heads, strict=True):
        rows_N = torch.zeros(batch.sequences * part.number, dtype=torch.long)
        weights_N = torch.zeros(len(rows_N))
        loss, _ = linear_cross_entropy(hidden_ND[rows_N], head_nD, rows_N[:first], weights_N[:first], device)
        total = total + loss
    return total


def _behave_as_on_gpu(model: nn.Module) -> None:
    """Make a model keep for the backward pass what it keeps on a GPU, in place; it is good for counting only.

    On a GPU dropout keeps one byte per number instead of a factor, fused attention keeps no dropout mask, LayerNorm
    and the maximum before it run in fp32 under autocast, and linear maps never run as convolutions.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.__class__ = _Dropout
        elif isinstance(module, LayerNorm):
            module.__class__ = _LayerNorm
        elif type(module) is Linear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
        elif isinstance(module, Attention) and module.function is fused_attention:
            module.function = _without_dropout  # type: ignore[assignment]


class _Dropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, True)[0] if self.p > 0 else input


class _LayerNorm(LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float() if torch.is_autocast_enabled("cpu") else input)


def _without_dropout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: float) -> Tensor:
    return fused_attention(q, k, v, mask, 0.0)
