"""Wrong tokens in the target slot: where they are, how many, and where they come from."""

from __future__ import annotations

import torch

from cogview_pl.data.sequence_dataset import SequenceBatch
from cogview_pl.lit.sequence_model import with_noise

ROWS, TEXT, IMAGE = 200, 5, 40


def batch() -> SequenceBatch:
    """Texts of ids 100 … 104, images of ids below 50, and a command (id 999) after each of both."""
    torch.manual_seed(0)
    texts, images = torch.arange(100, 105).expand(ROWS, TEXT), torch.randint(50, (ROWS, IMAGE))
    command = torch.full((ROWS, 1), 999)
    tokens = torch.cat([texts, command, images, command], 1)
    slots = torch.cat([torch.zeros(ROWS, TEXT + 1), torch.ones(ROWS, IMAGE), torch.full((ROWS, 1), -1)], 1).long()
    return SequenceBatch(tokens, torch.zeros_like(tokens), torch.ones(tokens.shape), slots)


def test_a_share_of_the_slot_is_replaced_by_tokens_of_the_slot() -> None:
    given = batch()
    found = with_noise(given, 1, 0.3)
    changed = found != given.tokens
    assert not changed[given.slots != 1].any()
    assert found[given.slots == 1].max() < 50
    assert 0.27 < changed[given.slots == 1].float().mean() < 0.31  # some are replaced by the same id


def test_the_end_of_a_text_stays_and_turns_up_nowhere_else() -> None:
    given = batch()
    found = with_noise(given, 0, 0.9)
    assert torch.equal(found[:, TEXT:], given.tokens[:, TEXT:])
    assert (found[:, :TEXT] < 105).all()
    assert (found[:, :TEXT] != given.tokens[:, :TEXT]).any()


def test_the_batch_itself_is_left_alone() -> None:
    given = batch()
    with_noise(given, 1, 0.9)
    assert torch.equal(given.tokens, batch().tokens)


def test_a_slot_of_no_or_one_token_stays_as_it_is() -> None:
    given = batch()
    assert torch.equal(with_noise(given, 2, 0.9), given.tokens)
    slots = torch.full_like(given.slots[:1], -1)
    slots[0, :2] = 0  # of two tokens the last always stays
    one = SequenceBatch(given.tokens[:1], given.positions[:1], given.weights[:1], slots)
    for _ in range(20):
        assert torch.equal(with_noise(one, 0, 1.0), one.tokens)
