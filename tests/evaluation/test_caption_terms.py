"""Terms of captions: what counts as a word, which terms are chosen, and labels."""

from __future__ import annotations

import pytest

from cogview_pl.errors import UserError
from cogview_pl.evaluation.caption_terms import choose_terms
from cogview_pl.evaluation.config import TermsConfig

CAPTIONS = ["红色的猫", "蓝色的猫", "红色的狗", "蓝色的狗，红色", "绿色的鸟"]


def options(longest: int = 2, min_share: float = 0.4, max_share: float = 0.8, max_terms: int = 9) -> TermsConfig:
    return TermsConfig(longest=longest, min_share=min_share, max_share=max_share, max_terms=max_terms)


def test_terms_and_labels_by_hand() -> None:
    """`色` and `的` are in all captions, words of the bird in one, and `红` is always in `红色`."""
    terms = choose_terms(CAPTIONS, options())
    assert terms.names == ["红色", "的狗", "的猫", "蓝色"]
    assert terms.shares.tolist() == pytest.approx([0.6, 0.4, 0.4, 0.4])
    captions = ["一只蓝色的狗，红色", "黑色", "红狗", ""]
    assert terms.labels(captions).tolist() == [[1, 1, 0, 1], [0] * 4, [0] * 4, [0] * 4]


def test_terms_of_one_word() -> None:
    terms = choose_terms(CAPTIONS, options(longest=1))
    assert terms.names == ["红", "狗", "猫", "蓝"]
    assert terms.labels(["红狗"]).tolist() == [[1, 1, 0, 0]]


def test_a_term_of_several_words_ends_at_punctuation() -> None:
    captions = ["a b, c", "a b; b", "b c (a)", "b c"]
    assert set(choose_terms(captions, options(min_share=0.5)).names) == {"a", "c", "a b", "b c"}


def test_words_of_letters_ignore_case_and_width() -> None:
    """`dog` is no part of `dogs`; vowel signs belong to their word."""
    terms = choose_terms(["A Red-haired man", "ｒｅｄ man", "red dogs", "dog, नमस्ते", "नमस्ते"], options(longest=1))
    assert terms.names == ["red", "man", "नमस्ते"]
    assert terms.labels(["RED hair", "redder", "Man!"]).tolist() == [[1, 0, 0], [0] * 3, [0, 1, 0]]


def test_only_the_most_frequent_are_taken() -> None:
    assert choose_terms(CAPTIONS, options(max_terms=1)).names == ["红色"]


@pytest.mark.parametrize("captions", [[], [""] * 4, ["同一句"] * 4, ["一", "二", "三"]])
def test_captions_without_a_term(captions: list[str]) -> None:
    with pytest.raises(UserError, match=rf"features\.terms: no word occurs in 2 to . of {len(captions)} captions"):
        choose_terms(captions, options())
