"""Metrics of ranking on cases whose answer is known."""

from __future__ import annotations

import pytest

from cogview_pl.evaluation.retrieval import Ranked, best_of, information, other_captions, place_of_own, retrieval
from cogview_pl.toy_world.accuracy import meaning


def test_best_of_n_follows_the_loss_and_the_oracle_the_truth() -> None:
    first = [Ranked(0, 3.0, False), Ranked(1, 2.0, True), Ranked(2, 1.0, False), Ranked(3, 4.0, True)]
    second = [Ranked(0, 1.0, True), Ranked(1, 2.0, False), Ranked(2, 3.0, False), Ranked(3, 0.5, False)]
    curve = best_of([first[::-1], second])  # the order of seeds matters, the order of the list does not
    assert curve == {1: (0.5, 0.5), 2: (1.0, 1.0), 4: (0.0, 1.0)}


def test_retrieval_counts_ties_against_the_own_caption() -> None:
    places = [place_of_own(losses) for losses in ([1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.0, 1.0, 1.0])]
    assert places == [1, 2, 3]
    assert retrieval(places, (1, 2, 3)) == {1: 1 / 3, 2: 2 / 3, 3: 1.0}


def test_information_takes_away_what_a_caption_has_with_every_image() -> None:
    losses = [[2.0, 1.0, 3.0], [1.5, 3.0, 2.5], [2.5, 1.25, 4.5]]  # caption 1 is the easiest for all images
    captions = [[0, 1, 2], [1, 0, 2], [2, 1, 0]]
    found = information(losses, captions)
    means = {0: (2.0 + 3.0 + 4.5) / 3, 1: (1.0 + 1.5 + 1.25) / 3, 2: (3.0 + 2.5 + 2.5) / 3}
    assert found[0] == pytest.approx([2.0 - means[0], 1.0 - means[1], 3.0 - means[2]])
    assert [place_of_own(values) for values in losses] == [2, 1, 2]
    assert [place_of_own(values) for values in found] == [1, 3, 1]


def test_others_say_something_else() -> None:
    for own in range(5):
        found = other_captions("abcde", own, 4)
        assert sorted([*found, own]) == list(range(5))
    assert set(other_captions("abacab", 0, 3)) == {
        1,
        3,
        5,
    }  # both other "a" have the same meaning
    many = list(range(100))
    assert other_captions(many, 3, 15) == other_captions(many, 3, 15) != other_captions(many, 4, 15)
    with pytest.raises(ValueError, match="3 say something else"):
        other_captions("abacab", 0, 4)


def test_meaning_is_what_is_said_not_how() -> None:
    said = "左上角有一个橙色的小心形，左下角有一个绿色的大十字形"
    assert meaning(said) == meaning("左下角的绿色大十字形和左上角的橙色小心形")
    assert meaning(said) != meaning("左下角的绿色大十字形和左上角的红色小心形")
    assert meaning(said) != meaning("左上角有一个橙色的小心形")
    assert meaning(said + "的油画图像") != meaning(said)
    assert meaning("一只猫") == "一只猫" != meaning("猫一只")
