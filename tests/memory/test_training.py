"""A training step played on fake tensors, against the same step on real tensors and against runs on an H100."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from cogview_pl.lit.low_memory import adamw_8bit, adamw_bf16
from cogview_pl.lit.muon import Muon
from cogview_pl.memory.phases import BACKWARD, FORWARD, GRADIENTS, OPTIMIZER, OPTIMIZER_STEP, UPDATE, WEIGHTS, Phases
from cogview_pl.memory.trace import LiveBytes, default_dtype
from cogview_pl.memory.training import (
    BatchSize,
    OptimizerBuilder,
    Predicted,
    StepOptions,
    image_tokenizer_step,
    parameter_groups,
    sequence_step,
)
from cogview_pl.transformer.config import ActivationCheckpointing, LoRAConfig, LoRATarget
from cogview_pl.transformer.lora import add_lora
from cogview_pl.transformer.loss import sequence_loss
from cogview_pl.transformer.model import Transformer
from cogview_pl.vqvae.adversarial import AdversarialLoss
from cogview_pl.vqvae.losses import reconstruction_loss
from cogview_pl.vqvae.model import VQVAE
from tests.composed import composed
from tests.make_models import make_transformer, make_vqvae

TARGETS = list(LoRATarget)
TEXT, CODES = range(96, 160), range(96)
SIZES = {"vocab_size": 160, "hidden_size": 64, "num_heads": 4, "num_positions": 48, "dropout": 0.1}
BATCH = BatchSize(8, 40, (Predicted(8, TEXT), Predicted(32, CODES)))
SGD = StepOptions(optimizer=partial(torch.optim.SGD, lr=0.1))

Build = Callable[[int], Transformer]


def builder(
    recompute: str = "none",
    lora: LoRAConfig | None = None,
    held: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> Build:
    def build(layers: int) -> Transformer:
        with default_dtype(dtype):
            model = make_transformer(**SIZES, num_layers=layers)
        if lora:
            add_lora(model, lora, held=held)
        model.set_activation_checkpointing(ActivationCheckpointing(recompute))
        return model

    return build


def real(build: Build, layers: int, batch: BatchSize, options: StepOptions) -> dict[str, Counter[str]]:
    """Bytes by phase and part of the second step of a real run, in the order of Lightning."""
    assert options.optimizer is not None
    with LiveBytes(WEIGHTS) as live:
        model = build(layers).train()
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(lambda p: live.claim(p.grad, GRADIENTS))
        shape = batch.sequences, batch.tokens + 1
        autocast = torch.autocast("cpu", options.autocast, enabled=options.autocast is not None)
        optimizer = options.optimizer(parameter_groups(model))
        for step in range(2):
            live.restart()
            with live.label("activations"):
                tokens, slots = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
                tokens[:, :9], slots[:, :9] = TEXT.start, 0
                positions, ones = torch.zeros_like(tokens), torch.ones(shape)
                with autocast:
                    loss = sequence_loss(model, tokens, positions, ones, slots, 2, [TEXT, CODES]).loss
                phases = {FORWARD: live.restart()}
                if not options.accumulates:
                    optimizer.zero_grad()
                    live.restart()
                loss.backward()
                phases[BACKWARD] = live.restart()
            with live.label(OPTIMIZER_STEP if step else OPTIMIZER):
                optimizer.step()
            phases[UPDATE] = live.restart()
            del tokens, slots, positions, ones, loss
    return phases


def allocated(phases: dict[str, Counter[str]]) -> tuple[int, int]:
    """Bytes of the forward and of the backward pass besides what is there between two steps."""
    forward = sum(phases[FORWARD].values()) - sum(phases[FORWARD][part] for part in (WEIGHTS, OPTIMIZER, GRADIENTS))
    backward = sum(phases[BACKWARD].values()) - sum(phases[BACKWARD][part] for part in (WEIGHTS, OPTIMIZER))
    return forward, backward


def check(build: Build, layers: int, batch: BatchSize = BATCH, options: StepOptions = SGD) -> None:
    played = sequence_step(build, layers, batch, options)
    assert allocated(played) == pytest.approx(allocated(real(build, layers, batch, options)), rel=0.02)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_bytes_are_those_of_a_real_step(layers: int, recompute: str, autocast: torch.dtype | None) -> None:
    check(builder(recompute), layers, options=replace(SGD, autocast=autocast))


def test_large_batches_are_played_whole() -> None:
    check(builder(), 2, BATCH._replace(sequences=150))


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_gradients_of_the_batch_before_are_not_allocated_again(recompute: str) -> None:
    check(builder(recompute), 4, options=replace(SGD, accumulates=True))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:-1]], ids=["with_tokens", "blocks"])
def test_adapters_are_counted_as_they_train(
    targets: list[LoRATarget], recompute: str, autocast: torch.dtype | None
) -> None:
    lora = LoRAConfig(rank=4, alpha=4, targets=targets, merge=True)
    check(builder(recompute, lora, autocast or torch.float32), 4, options=replace(SGD, autocast=autocast))


def test_averages_of_the_weights_take_fp32_of_each_trained_weight() -> None:
    plain, averaged = (sequence_step(builder(), 2, BATCH, replace(SGD, averaged=on)) for on in (False, True))
    for phase, parts in averaged.items():
        assert parts["averages"] == parts[WEIGHTS]
        assert parts - Counter(averages=parts["averages"]) == plain[phase]


def test_a_gpu_keeps_less_of_attention_and_dropout() -> None:
    cpu, gpu = (
        sequence_step(builder(), 4, BATCH, replace(SGD, on_gpu=on_gpu))[FORWARD]["activations"]
        for on_gpu in (False, True)
    )
    scores = 4 * 8 * 4 * 40 * 40 * 4  # layers, sequences, heads, queries, keys, bytes: kept once at least on a CPU
    assert cpu - gpu > scores


ADAM = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
OPTIMIZERS: dict[str, tuple[OptimizerBuilder, torch.dtype]] = {
    "adamw": (partial(torch.optim.AdamW, lr=0.1), torch.float32),
    "fused": (partial(torch.optim.AdamW, lr=0.1, fused=True), torch.float32),
    "muon": (partial(Muon, matrix_lr=0.1, momentum=0.9, fused=False, **ADAM), torch.float32),
    "8bit": (partial(adamw_8bit, **ADAM), torch.float32),
    "8bit_bf16": (partial(adamw_8bit, **ADAM), torch.bfloat16),
    "bf16": (partial(adamw_bf16, **ADAM), torch.bfloat16),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_of_an_optimizer_are_those_of_a_real_step(name: str) -> None:
    if "bit" in name or name == "bf16":
        pytest.importorskip("torchao")
    optimizer, dtype = OPTIMIZERS[name]
    options = replace(SGD, optimizer=optimizer)
    played = sequence_step(builder(dtype=dtype), 4, BATCH, options)[UPDATE]
    found = real(builder(dtype=dtype), 4, BATCH, options)[UPDATE]
    tables = 2 * 256 * 4 * (4 * 4 + 1) if "8bit" in name else 0  # real 8-bit states share their two tables
    assert played[OPTIMIZER] - tables == pytest.approx(found[OPTIMIZER], abs=10_000)
    assert played[OPTIMIZER_STEP] == pytest.approx(found[OPTIMIZER_STEP], rel=0.15, abs=4096)


def test_a_gpu_updates_all_tensors_of_a_group_at_once_unless_fused() -> None:
    foreach, fused = (
        sequence_step(builder(), 4, BATCH, replace(SGD, optimizer=optimizer, on_gpu=True))[UPDATE]
        for optimizer in (partial(torch.optim.AdamW, foreach=True), OPTIMIZERS["fused"][0])
    )
    assert foreach[OPTIMIZER_STEP] == 4 * 4 * 12 * 64**2  # fp32 matrices of four blocks, the largest group
    assert fused[OPTIMIZER_STEP] == 0


SIZE_4B = {"hidden_size": 2560, "num_heads": 40}
SIZE_400M = {"hidden_size": 1088, "num_heads": 17}


@pytest.mark.parametrize(
    ("size", "layers", "sequences", "recompute", "compiled", "measured"),
    [
        (SIZE_4B, 48, 4, "none", False, 45.9e9),
        (SIZE_4B, 48, 4, "none", True, 44.8e9),
        (SIZE_4B, 48, 10, "none", True, 71.8e9),
        (SIZE_4B, 48, 8, "selective", False, 49.6e9),
        (SIZE_4B, 48, 16, "block", False, 33.4e9),
        (SIZE_400M, 24, 24, "none", False, 28.5e9),
        (SIZE_400M, 24, 24, "none", True, 27.1e9),
    ],
)
def test_steps_of_large_models_take_what_an_h100_measured(
    size: dict[str, int], layers: int, sequences: int, recompute: str, compiled: bool, measured: float
) -> None:
    """The step of the benchmark has bf16 weights and no dropout, and frees gradients before the forward pass."""

    def build(layers: int) -> Transformer:
        with default_dtype(torch.bfloat16):
            model = make_transformer(**size, num_layers=layers, vocab_size=58_240, num_positions=1089)
        model.set_activation_checkpointing(ActivationCheckpointing(recompute))
        return model

    batch = BatchSize(sequences, 1088, (Predicted(1088, range(58_240)),))
    options = StepOptions(optimizer=OPTIMIZERS["fused"][0], on_gpu=True, compiled=compiled)
    phases = sequence_step(build, layers, batch, options)
    phases[FORWARD][GRADIENTS] = 0
    assert max(sum(parts.values()) for parts in phases.values()) == pytest.approx(measured, rel=0.035)


@pytest.mark.parametrize("regularisation", ["none", "lecam", "r1"])
def test_bytes_of_a_discriminator_are_those_of_a_real_step(regularisation: str) -> None:
    """Whose activations are most of the step."""
    tokenizer = composed(
        *("task=vqvae", "image_tokenizer/adversarial=patch", "image_tokenizer.adversarial.hidden_size=8"),
        f"image_tokenizer.adversarial.regularisation={regularisation}",
    ).image_tokenizer

    def build() -> VQVAE:
        return make_vqvae("learned", hidden_size=8, codebook_dim=8, codebook_size=16)

    played = image_tokenizer_step(build, 4, 64, tokenizer, SGD)
    with LiveBytes(WEIGHTS) as live:
        assert tokenizer.adversarial is not None
        model, adversarial = build(), AdversarialLoss(tokenizer.adversarial)

        def loss() -> torch.Tensor:
            images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
            images = (images.float() / 255).contiguous(memory_format=torch.channels_last)
            output = model(images)
            error = reconstruction_loss(tokenizer.reconstruction, output.reconstruction, images)
            last = model.decoder[-1].weight
            terms = adversarial(images, output.reconstruction, error, last, join=lambda mean: mean, scale=1.0)
            return error + output.quantized.loss + terms.tokenizer + terms.discriminator

        optimizer = torch.optim.SGD([*model.parameters(), *adversarial.parameters()], lr=0.1)
        for _ in range(2):
            live.restart()
            value = loss()
            forward = live.restart()
            optimizer.zero_grad()
            live.restart()
            value.backward()
            backward = live.restart()
            optimizer.step()
            del value
    assert played[FORWARD].total() == pytest.approx(forward.total(), rel=0.05)
    assert played[BACKWARD].total() == pytest.approx(backward.total(), rel=0.05)


def test_a_frozen_codebook_and_encoder_have_no_gradients_and_no_activations() -> None:
    def step(part: str) -> Phases:
        tokenizer = composed("task=vqvae", f"image_tokenizer.trained_part={part}").image_tokenizer
        return image_tokenizer_step(partial(make_vqvae, "learned", **sizes), 4, 64, tokenizer, SGD)

    sizes = {"hidden_size": 8, "codebook_dim": 8, "codebook_size": 16}
    whole, decoder = step("all"), step("decoder")
    assert decoder[FORWARD][WEIGHTS] == whole[FORWARD][WEIGHTS]
    assert 0 < decoder[UPDATE][GRADIENTS] < whole[UPDATE][GRADIENTS]
    assert decoder[FORWARD].total() < whole[FORWARD].total()
