"""Stage 2 under Lightning: its losses, steps and validation figures against cross-entropies worked out here."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from torch import Tensor

from cogview_pl.data.sequence_dataset import SequenceBatch
from cogview_pl.lit.sequence_model import with_noise
from cogview_pl.transformer.model import Transformer

from .fitting import fit, loader, trainer, validate
from .models import DECAY, LR, NAMES, SLOT_IDS
from .models import sequence_batch as batch
from .models import sequence_module as module

BATCHES = [batch(1, 3, 4, 5), batch(2, 1, 2, 7), batch(3, 5, 6, 3, text_weight=3.0), batch(4, 2, 3, 3)]
ONE_WORD = batch(5, 1, 1, 5)
SILENT = BATCHES[0]._replace(weights=torch.zeros_like(BATCHES[0].weights), slots=torch.full_like(BATCHES[0].slots, -1))


def entropies(model: Transformer, given: SequenceBatch, inputs: Tensor | None, ids: list[range] | None) -> Tensor:
    """Cross-entropy (nats) of each token after the first of its row, among all ids or those of its slot."""
    logits = model((given.tokens if inputs is None else inputs)[:, :-1], given.positions[:, :-1])
    if ids is not None:
        allowed = torch.zeros(len(ids) + 1, logits.shape[-1], dtype=torch.bool)
        for slot, some in enumerate(ids):
            allowed[slot, some.start : some.stop] = True
        allowed[-1] = True  # slot -1, which counts nothing
        logits = logits.masked_fill(~allowed[given.slots[:, 1:]], -torch.inf)
    return F.cross_entropy(logits.transpose(1, 2), given.tokens[:, 1:], reduction="none")


def weighted(model: Transformer, given: SequenceBatch, inputs: Tensor | None = None) -> Tensor:
    """The loss of a batch."""
    weights = given.weights[:, 1:]
    return (entropies(model, given, inputs, SLOT_IDS) * weights).sum() / weights.sum()


def slot_mean(model: Transformer, given: list[SequenceBatch], slot: int, ids: list[range] | None) -> float:
    """Mean cross-entropy of a slot's tokens that have a weight, whatever it is."""
    found = [
        entropies(model, some, None, ids)[(some.slots == slot)[:, 1:] & (some.weights > 0)[:, 1:]] for some in given
    ]
    return torch.cat(found).mean().item()


@pytest.mark.parametrize("ids", [SLOT_IDS, None])
def test_validation_means_are_over_all_tokens_of_batches_of_different_size(ids: list[range] | None) -> None:
    """Also a second time; a batch without a token that counts changes nothing."""
    tested = module(ids)
    for batches in (BATCHES[:3], [*BATCHES[1:], SILENT], [ONE_WORD]):
        found = validate(tested, batches)
        with torch.no_grad():
            both = [(entropies(tested.model, some, None, ids) * some.weights[:, 1:]).sum() for some in batches]
            weight = sum(some.weights[:, 1:].sum() for some in batches)
            expected = {f"val/loss_{NAMES[slot]}": slot_mean(tested.model, batches, slot, ids) for slot in (0, 1)}
        assert found == pytest.approx(expected | {"val/loss": float(sum(both) / weight)}, rel=1e-5)


def reference_steps(model: Transformer, clip: float | None) -> tuple[list[float], list[float]]:
    """Plain training on `BATCHES`: losses and gradient norms of the steps."""
    matrices, tables, vectors = model.parameter_groups()
    groups = [{"params": [*matrices, *tables], "weight_decay": DECAY}, {"params": vectors}]
    optimizer = torch.optim.SGD(groups, lr=LR)
    losses, norms = [], []
    for given in BATCHES:
        optimizer.zero_grad()
        loss = weighted(model, given)
        loss.backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item())
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        losses.append(loss.item())
        optimizer.step()
    return losses, norms


@pytest.mark.parametrize("clip", [None, 0.3])
def test_steps_and_logs_are_those_of_plain_training(clip: float | None) -> None:
    """Weights after clipped steps, the loss, and the norm of the gradient before clipping."""
    tested = module()
    reference = copy.deepcopy(tested.model)
    log = fit(tested, BATCHES, gradient_clip_val=clip)
    losses, norms = reference_steps(reference, clip)
    assert min(norms) > 0.6
    assert log.series("train/loss") == pytest.approx(dict(enumerate(losses)), rel=1e-4)
    assert log.series("train/gradient_norm") == pytest.approx(dict(enumerate(norms)), rel=1e-4)
    for ours, wanted in zip(tested.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_losses_of_slots_are_logged_at_logging_steps_where_they_have_tokens() -> None:
    tested = module()
    tested.build_optimizer = partial(torch.optim.SGD, lr=0.0)  # weights stay
    without_text = BATCHES[1]._replace(weights=BATCHES[1].weights * (BATCHES[1].slots == 1))
    log = fit(tested, [BATCHES[0], without_text, SILENT, ONE_WORD], every=2)
    expected = slot_mean(tested.model, [ONE_WORD], 0, SLOT_IDS)
    images = {step: slot_mean(tested.model, [given], 1, SLOT_IDS) for step, given in ((1, without_text), (3, ONE_WORD))}
    assert log.series("train/loss_text") == pytest.approx({3: expected}, rel=1e-5)
    assert log.series("train/loss_image") == pytest.approx(images, rel=1e-5)
    assert not log.series("train/loss_unused")


class Seeds(Callback):
    """Draws of a step depend on its number alone."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)


def test_noise_is_read_but_never_a_target_and_not_in_validation() -> None:
    tested = module(noise=0.5)
    reference = copy.deepcopy(tested.model)
    assert validate(tested, BATCHES) == validate(module(), BATCHES)
    log = fit(tested, BATCHES[:1], callbacks=[Seeds()])
    torch.manual_seed(0)
    inputs = with_noise(BATCHES[0], 1, 0.5)
    assert not torch.equal(inputs, BATCHES[0].tokens)
    with torch.no_grad():
        assert log.series("train/loss") == pytest.approx({0: weighted(reference, BATCHES[0], inputs).item()}, rel=1e-5)


def test_weight_decay_is_for_matrices_and_tables() -> None:
    """Muon is for matrices alone; frozen weights are in no group."""
    tested = module()
    tested.model.token_embedding.requires_grad_(False)
    tested.trainer = trainer(1)
    groups = tested.configure_optimizers()["optimizer"].param_groups
    rows = [(g["name"], g["matrices"], g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups]
    assert rows == [
        ("matrices", True, DECAY, {2}),
        ("tables", False, DECAY, {2}),
        ("vectors", False, 0.0, {1}),
    ]
    assert [id(p) for p in groups[1]["params"]] == [id(tested.model.position_embedding.weight)]
    assert sum(len(group["params"]) for group in groups) == len(list(tested.parameters())) - 1


def test_checkpoints_leave_frozen_weights_out_and_are_read_over_them(tmp_path: Path) -> None:
    straight, first, second = (module(trained="blocks.") for _ in range(3))
    fit(straight, BATCHES)
    given = trainer(2)
    given.fit(first, loader(BATCHES[:2]))
    given.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {name for name in first.state_dict() if name.startswith("model.blocks.")}
    trainer(4).fit(second, loader(BATCHES[2:] * 2), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    for name, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_checkpoint_that_lacks_a_trained_weight_is_refused(tmp_path: Path) -> None:
    given = trainer(1)
    given.fit(module(), loader(BATCHES[:1]))
    given.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    del saved["state_dict"]["model.position_embedding.weight"]
    torch.save(saved, tmp_path / "x.ckpt")
    with pytest.raises(RuntimeError, match="position_embedding"):
        trainer(2).fit(module(), loader(BATCHES), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
