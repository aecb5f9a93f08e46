"""Position ids against the original: in training, where they restart, and as it feeds them when it samples."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from cogview_pl.vocab import Template, Vocabulary
from cogview_pl.vocab.vocabulary import COMMANDS

from .conftest import Records

RESTART = "[ROI2]"
LAYOUT = "[ROI1] {text} [BASE] [BOI1] {image:1x1} [EOI1] [ROI2] [POS0] [BASE] [BOI2] {large:1x1} [EOI2]"


@pytest.fixture(scope="module")
def meta(parity: Records) -> dict[str, Any]:
    return parity.json("positions/meta.json")


@pytest.fixture(scope="module")
def rows(parity: Records, meta: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The recorded rows and their ids, by case."""
    records = parity.tensors("positions/positions.safetensors")
    names = ("tokens", "train_position_ids", "plain_position_ids")
    return {case: {name: records[f"{case}.{name}"] for name in names} for case in meta if f"{case}.tokens" in records}


@pytest.fixture(scope="module")
def restart(meta: dict[str, Any], rows: dict[str, dict[str, Tensor]]) -> int:
    """Id of the restart token; it is all that position ids depend on."""
    ids = {
        token
        for case, row in rows.items()
        for tokens, places in zip(row["tokens"].tolist(), meta[case]["roi2_at"], strict=True)
        for token in (tokens[place] for place in places)
    }
    (restart,) = ids
    return restart


def template(restart: int, **settings: Any) -> Template:
    before = restart - COMMANDS.index(RESTART)  # images and text tokens together
    vocabulary = Vocabulary(codebook_size=1, text_vocab_size=before - 1)
    return Template(LAYOUT, target="large", loss={}, vocabulary=vocabulary, text_length=1, **settings)


def test_positions_restart_in_training(meta: dict[str, Any], rows: dict[str, dict[str, Tensor]], restart: int) -> None:
    restarting = template(restart, restart_positions_at=RESTART)
    for case, row in rows.items():
        # The original caps ids at its table. Ours are never capped: rows that need a larger table are refused.
        last = meta[case]["max_position_embeddings"] - 1
        for tokens, recorded in zip(row["tokens"].tolist(), row["train_position_ids"].tolist(), strict=True):
            found = restarting.positions(tokens)
            assert [min(position, last) for position in found] == recorded, case


def test_positions_without_restart(rows: dict[str, dict[str, Tensor]], restart: int) -> None:
    plain = template(restart)
    for case, row in rows.items():
        for tokens, recorded in zip(row["tokens"].tolist(), row["plain_position_ids"].tolist(), strict=True):
            assert plain.positions(tokens) == recorded, case


def test_positions_fed_when_sampling(meta: dict[str, Any], restart: int) -> None:
    sampling = template(restart, restart_positions_at=RESTART, restart_after_token=True)
    for case, feed in meta["generation_feed"].items():
        fed: list[int] = []
        recorded: list[int] = []
        for call in feed["calls"]:
            if (fed + call["tokens"]).count(restart) > 1:
                break  # layouts restart once; in the original the last marker wins for what is fed with it and after
            fed += call["tokens"]
            recorded += call["position_ids"]
        assert restart in fed, case
        assert fed == feed["output"][: len(fed)], case
        assert sampling.prompt_positions(fed) == recorded, case
