"""Terms of captions, which a feature network learns to find in images.

A term is a word, or several words that follow each other (Li et al. 2017, https://arxiv.org/abs/1612.09161). In scripts
without spaces, such as Chinese, each character is a word. Text tokens would not do: SentencePiece splits a word in
another way in another sentence, so the same object would have several labels.

Shapes: N captions, T terms.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.evaluation.config import TermsConfig

Term = tuple[str, ...]
"""Words of a term."""

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u2e80-\u2fdf\u3040-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # CJK
)
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-\u00bf\u2000-\u206f\u3000-\u303f\ufe30-\ufe4f\uff00-\uff65]+")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_FEWEST = 2  # captions that a term must occur in, so that there is something to learn
_BITS = 64  # of the mark of a caption


class CaptionTerms:
    """A list of terms, and the labels of captions.

    Args:
        terms: the terms; their places are the numbers of the labels.
        shares: share of the captions that each occurs in.
    """

    def __init__(self, terms: Sequence[Term], shares: Sequence[float]) -> None:
        self.shares = torch.tensor(shares, dtype=torch.float32)
        self.names = [_name(term) for term in terms]
        self._numbers = {term: number for number, term in enumerate(terms)}
        self._longest = max(map(len, terms), default=0)

    def __len__(self) -> int:
        return len(self.names)

    def labels(self, captions: Sequence[str]) -> Tensor:
        """Whether each term occurs in each caption: float 0 or 1, `(N, T)`."""
        found = torch.zeros(len(captions), len(self))
        for row, caption in enumerate(captions):
            phrases = _phrases(caption)
            for length in range(1, self._longest + 1):
                for term in _runs(phrases, length):
                    if term in self._numbers:
                        found[row, self._numbers[term]] = 1
        return found


def choose_terms(captions: Iterable[str], options: TermsConfig) -> CaptionTerms:
    """The terms that occur in some captions and not in nearly all, most frequent first.

    Of terms that occur in the same captions only the longest is taken: more could not be learned from the others.

    Args:
        captions: captions of training images.
        options: length, shares and number of the terms.

    Raises:
        UserError: there are none.
    """
    phrases = [_phrases(caption) for caption in captions]
    size = len(phrases)
    least = max(_FEWEST, math.ceil(options.min_share * size))
    most = math.floor(options.max_share * size)
    distinct: dict[int, tuple[Term, int]] = {}
    frequent: dict[Term, _Occurrences] = {}
    for length in range(1, options.longest + 1):
        found = _occurrences(phrases, length, frequent)
        frequent = {term: where for term, where in found.items() if where.captions >= least}
        if not frequent:
            break
        distinct |= {where.mark: (term, where.captions) for term, where in frequent.items() if where.captions <= most}
    chosen = sorted(distinct.values(), key=lambda found: (-found[1], found[0]))[: options.max_terms]
    if not chosen:
        raise UserError(
            f"features.terms: no word occurs in {least:,} to {most:,} of {size:,} captions; check data.caption_field, "
            f"or change features.terms.min_share={options.min_share:g} and max_share={options.max_share:g}"
        )
    return CaptionTerms([term for term, _ in chosen], [count / size for _, count in chosen])


class _Occurrences(NamedTuple):
    """The captions that a term occurs in."""

    captions: int
    mark: int
    """Exclusive or of the random marks of the captions, equal for equal captions only (but for one in 2⁶⁴)."""


def _occurrences(
    phrases: Sequence[list[list[str]]], length: int, frequent: dict[Term, _Occurrences]
) -> dict[Term, _Occurrences]:
    """Occurrences of terms of a length; beyond one word, both parts without an end must be `frequent`.

    So rare words, of which there can be millions, form no longer terms.
    """
    random_bits = random.Random(0)
    counts: Counter[Term] = Counter()
    marks: dict[Term, int] = {}
    for caption in phrases:
        mark = random_bits.getrandbits(_BITS)
        runs = {term for term in _runs(caption, length) if length == 1 or _parts_in(frequent, term)}
        counts.update(runs)
        for term in runs:
            marks[term] = marks.get(term, 0) ^ mark
    return {term: _Occurrences(counts[term], marks[term]) for term in sorted(counts)}


def _parts_in(frequent: dict[Term, _Occurrences], term: Term) -> bool:
    return term[1:] in frequent and term[:-1] in frequent


def _phrases(caption: str) -> list[list[str]]:
    """The words of a caption, in lower case, between marks of punctuation."""
    text = unicodedata.normalize("NFKC", caption).casefold()
    return [_WORD.findall(phrase) for phrase in _PUNCTUATION.split(text)]


def _runs(phrases: Iterable[list[str]], length: int) -> Iterator[Term]:
    """Each run of `length` words within a phrase."""
    for words in phrases:
        for start in range(len(words) - length + 1):
            yield tuple(words[start : start + length])


def _name(term: Term) -> str:
    """The term as written: words of letters with spaces between them."""
    text = term[0]
    for before, word in pairwise(term):
        unspaced = re.fullmatch(f"[{_UNSPACED}]", before) or re.fullmatch(f"[{_UNSPACED}]", word)
        text += word if unspaced else f" {word}"
    return text
