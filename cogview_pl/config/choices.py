"""Keys of the configuration that take one of a few names."""

from __future__ import annotations

from enum import Enum


class Verb(Enum):
    """What a task does; each is a file in `cogview_pl/tasks/`."""

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
