"""Choices of keys of the whole configuration."""

from __future__ import annotations

from enum import Enum


class Verb(Enum):
    """What a task does; each verb is a file in `cogview_pl/tasks/`."""

    fit_image_tokenizer = "fit_image_tokenizer"
    fit_sequence_model = "fit_sequence_model"
    tokenize = "tokenize"
    generate = "generate"
    rerank = "rerank"
    magnify = "magnify"
    fit_features = "fit_features"
    evaluate = "evaluate"
    convert = "convert"
    chain = "chain"

    @property
    def trains_in_parallel(self) -> bool:
        """Whether every process of a run takes part; of other verbs the first process does all work alone."""
        return self in (Verb.fit_image_tokenizer, Verb.fit_sequence_model)

    @property
    def must_fit(self) -> bool:
        """Whether the memory that it needs is estimated before it starts."""
        return self.trains_in_parallel or self == Verb.generate
