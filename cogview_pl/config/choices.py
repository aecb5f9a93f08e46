"""Choices of top-level keys of the configuration."""

from __future__ import annotations

from enum import Enum


class Verb(Enum):
    """Kind of a task; each verb is a file in `cogview_pl/tasks/`."""

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
        """Whether all processes of a run take part; see `shares_batches` for other verbs."""
        return self in (Verb.fit_image_tokenizer, Verb.fit_sequence_model)

    @property
    def shares_batches(self) -> bool:
        """Whether the devices of a run share its prompts or images."""
        return self in (Verb.tokenize, Verb.generate, Verb.rerank, Verb.magnify, Verb.evaluate)

    @property
    def must_fit(self) -> bool:
        """Whether its memory is estimated before it starts."""
        return self.trains_in_parallel or self == Verb.generate
