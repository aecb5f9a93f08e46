"""Figures of ranking on cases whose answer is known."""

from __future__ import annotations

import pytest
import torch

from cogview_pl.evaluation.ranking import Ranked, best_of, other_captions, retrieval


def test_best_of_n_follows_the_loss_and_the_oracle_the_truth() -> None:
    first = [Ranked(0, 3.0, False), Ranked(1, 2.0, True), Ranked(2, 1.0, False), Ranked(3, 4.0, True)]
    second = [Ranked(0, 1.0, True), Ranked(1, 2.0, False), Ranked(2, 3.0, False), Ranked(3, 0.5, False)]
    curve = best_of([first[::-1], second])  # the order of the list does not matter, that of the seeds does
    assert curve == {1: (0.5, 0.5), 2: (1.0, 1.0), 4: (0.0, 1.0)}


def test_retrieval_counts_ties_against_the_own_caption() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.0, 1.0, 1.0]])
    assert retrieval(losses, (1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})


def test_others_are_others() -> None:
    for own in range(5):
        found = other_captions(5, own, 4)
        assert sorted([*found, own]) == list(range(5))
    assert other_captions(100, 3, 15) == other_captions(100, 3, 15) != other_captions(100, 4, 15)
    with pytest.raises(ValueError):
        other_captions(5, 0, 5)
