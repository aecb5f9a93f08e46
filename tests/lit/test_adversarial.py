"""Stage 1 with a discriminator under Lightning, against textbook training with two optimizers."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import Tensor

from cogview_pl.lit.callbacks import EMA
from cogview_pl.lit.image_tokenizer import ImageTokenizerModule
from cogview_pl.lit.muon import Muon
from cogview_pl.vqvae.config import Regularisation

from .fitting import fit, loader, trainer
from .models import MOMENTUM, TOKENIZER_LR, discriminated, tokenizer_module
from .models import RECONSTRUCTION_WEIGHT as WEIGHT
from .models import image_batch as batch

ADAMW = partial(torch.optim.AdamW, lr=0.01)
BATCHES = [batch(1, 3), batch(2, 2), batch(3, 4), batch(4, 2)]


def weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def states(module: ImageTokenizerModule) -> list[bool]:
    """Whether the optimizer has state of each parameter of the discriminator."""
    optimizer = module.trainer.optimizers[0]
    assert module.adversarial is not None
    return [bool(optimizer.state.get(parameter)) for parameter in module.adversarial.parameters()]


@pytest.mark.parametrize("clip", [None, 0.05])
def test_steps_and_logs_are_those_of_two_optimizers(clip: float | None) -> None:
    """With a late start, learning rates of their own, and gradients that are clipped network by network."""
    start, lr = 2, 0.05
    tested = tokenizer_module(adversarial=discriminated(start=start, lr=lr))
    model, adversarial = copy.deepcopy(tested.model), copy.deepcopy(tested.adversarial)
    assert adversarial is not None
    log = fit(tested, BATCHES, gradient_clip_val=clip)
    first = torch.optim.SGD(model.parameters(), lr=TOKENIZER_LR, momentum=MOMENTUM)
    second = torch.optim.SGD(adversarial.parameters(), lr=lr, momentum=MOMENTUM)
    expected: dict[str, dict[int, float]] = {}
    for step, given in enumerate(BATCHES):
        images = given.images / 255
        output = model(images)
        loss = error = WEIGHT * (output.reconstruction - images).square().mean()
        loss = loss + output.quantized.loss
        first.zero_grad()
        second.zero_grad()
        logged: dict[str, Any] = {}
        if step >= start:
            last = model.decoder[-1].weight
            terms = adversarial(images, output.reconstruction, error, last, join=lambda mean: mean, scale=1.0)
            loss = loss + terms.tokenizer
            terms.discriminator.backward(retain_graph=True)
            logged = {f"adversarial/{name}": value for name, value in terms.figures.items()}
        loss.backward()
        norms = []
        for network, optimizer in ((model, first), (adversarial, second)):
            parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, clip or 1e9))
            optimizer.step()
        logged |= {"train/loss": loss, "train/gradient_norm": norms[0]}
        if step >= start:
            logged["adversarial/gradient_norm"] = norms[1]
            assert not clip or min(norms) > clip
        for name, value in logged.items():
            expected.setdefault(name, {})[step] = float(value)
    for name, values in expected.items():
        assert log.series(name) == pytest.approx(values, rel=1e-3, abs=1e-6), name
    for ours, wanted in ((tested.model, model), (tested.adversarial, adversarial)):
        assert ours is not None
        for one, other in zip(ours.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_run_is_that_without_a_discriminator_until_it_starts() -> None:
    """Bit for bit; the discriminator neither moves nor gets a state in the optimizer, also of steps without images."""
    given = [BATCHES[0], batch(0, 0), *BATCHES[1:]]
    plain = tokenizer_module("ema", build_optimizer=ADAMW)
    tested = tokenizer_module("ema", adversarial=discriminated(start=9), build_optimizer=ADAMW)
    before = weights(tested)
    for module in (plain, tested):
        torch.manual_seed(1)
        fit(module, given, gradient_clip_val=0.05)
    after = weights(tested)
    for name, value in weights(plain).items():
        assert torch.equal(after[name], value), name
    theirs = [name for name in after if name.startswith("adversarial.")]
    assert theirs and all(torch.equal(after[name], before[name]) for name in theirs)
    assert not any(states(tested))


def test_a_batch_without_images_counts_no_step_of_the_discriminator() -> None:
    tested = tokenizer_module(adversarial=discriminated(start=2), build_optimizer=ADAMW)
    given = trainer(3, accumulate_grad_batches=2)
    given.fit(tested, loader([BATCHES[0], batch(0, 0), BATCHES[1], batch(0, 0), BATCHES[2], BATCHES[3]]))
    assert tested.adversarial is not None
    steps = {int(given.optimizers[0].state[p]["step"]) for p in tested.adversarial.parameters()}
    assert steps == {1}


@pytest.mark.parametrize("regularisation", ["lecam", "r1"])
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(tmp_path: Path, regularisation: str) -> None:
    """Bit for bit, when it is stopped before the discriminator starts and after."""

    def made() -> ImageTokenizerModule:
        options = {"start": 2, "regularisation": Regularisation(regularisation), "betas": [0.5, 0.9]}
        return tokenizer_module("ema", adversarial=discriminated(**options), build_optimizer=ADAMW)

    whole = made()
    fit(whole, BATCHES, gradient_clip_val=0.05)
    for stop in (1, 3):
        file = tmp_path / f"{stop}.ckpt"
        given = trainer(stop, gradient_clip_val=0.05)
        given.fit(made(), loader(BATCHES))
        given.save_checkpoint(file)
        second = made()
        rest = loader([*BATCHES[stop:], *BATCHES[:stop]])
        trainer(4, gradient_clip_val=0.05).fit(second, rest, ckpt_path=file, weights_only=True)
        assert second.global_step == 4
        for name, value in weights(whole).items():
            assert torch.equal(weights(second)[name], value), name


def test_the_discriminator_has_hyperparameters_of_its_own_and_no_muon() -> None:
    muon = partial(Muon, lr=0.01, matrix_lr=0.02, momentum=0.9, betas=(0.9, 0.98), eps=1e-8, fused=False)
    for build, betas in ((muon, (0.9, 0.98)), (partial(torch.optim.AdamW, lr=0.01), (0.9, 0.999))):
        tested = tokenizer_module(adversarial=discriminated(lr=0.03, betas=[0.5, 0.6]), build_optimizer=build)
        tested.trainer = trainer(1)
        groups = {group["name"]: group for group in tested.configure_optimizers()["optimizer"].param_groups}
        assert (groups["vectors"]["initial_lr"], groups["vectors"]["betas"]) == (0.01, betas)
        theirs = groups["discriminator"]
        assert (theirs["initial_lr"], theirs["betas"]) == (0.03, (0.5, 0.6))
        assert (theirs["matrices"], theirs["weight_decay"]) == (False, 0.0)
        assert tested.adversarial is not None
        assert {id(p) for p in theirs["params"]} == {id(p) for p in tested.adversarial.parameters()}
        assert sum(len(group["params"]) for group in groups.values()) == len(list(tested.parameters()))


def test_bf16_gives_the_terms_of_fp32_within_its_rounding() -> None:
    logs = []
    for options in ({}, {"precision": "bf16-mixed"}):
        tested = tokenizer_module(adversarial=discriminated(regularisation=Regularisation.none))
        logs.append(fit(tested, BATCHES[:1], **options))  # type: ignore[arg-type]
    for name in ("weight", "logit_real", "logit_made", "discriminator_loss"):
        one, other = (log.series(f"adversarial/{name}")[0] for log in logs)
        assert one == pytest.approx(other, rel=0.05, abs=0.02), name


def test_averages_are_of_the_tokenizer_alone() -> None:
    tested = tokenizer_module(adversarial=discriminated())
    average = EMA(0.5)
    given = trainer(2, callbacks=[average])
    given.fit(tested, loader(BATCHES[:2]))
    checkpoint: dict[str, Any] = {}
    average.on_save_checkpoint(given, tested, checkpoint)
    (averages,) = checkpoint.values()
    assert averages.keys() == {name for name, _ in tested.named_parameters() if name.startswith("model.")}


@pytest.mark.parametrize("kind", ["ema", "learned", "gumbel", "fixed"])
def test_frozen_codes_stay_while_the_decoder_learns(kind: str) -> None:
    tested = tokenizer_module(kind, adversarial=discriminated())
    images = batch(7, 5).images / 255
    before, codes = weights(tested.model), tested.model.encode(images)  # type: ignore[arg-type]
    tested.model.freeze_codes()
    fit(tested, BATCHES)
    assert torch.equal(tested.model.encode(images), codes)
    for name, value in tested.model.state_dict().items():
        if name.startswith("decoder."):
            assert not torch.equal(value, before[name]), name
        elif not name.endswith("temperature"):  # of the noise in training, which lookup does not use
            assert torch.equal(value, before[name]), name
