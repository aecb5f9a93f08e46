"""Text, vocabulary and layouts against the original's records: the same ids for the same strings."""

from __future__ import annotations

import hashlib
import math
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from cogview_pl.config.schema import register_schemas
from cogview_pl.vocab import COMMANDS, Template, TextTokenizer, Vocabulary

CONF = Path(__file__).parents[2] / "conf"
SIZE = {8: "[TINY]", 16: "[SMALL]", 32: "[BASE]", 64: "[BIG]"}
"""Command token that names the size of a square of codes, by its edge."""
OPEN = -1
"""What the original's queries hold where a token is to be drawn."""


@pytest.fixture(scope="module")
def recorded(parity) -> dict[str, Any]:
    return parity.json("text/vocabulary.json")


@pytest.fixture(scope="module")
def tokenizer(text_model) -> TextTokenizer:
    return TextTokenizer.load(text_model)


@pytest.fixture(scope="module")
def vocabulary(recorded) -> Vocabulary:
    return Vocabulary(recorded["n_img"], recorded["n_text"])


def template(layout: str, target: str, vocabulary: Vocabulary, text_length: int = 1000) -> Template:
    return Template(layout, target=target, loss={}, vocabulary=vocabulary, text_length=text_length)


class TestVocabulary:
    def test_ranges_and_size(self, recorded, vocabulary) -> None:
        assert [vocabulary.codes.start, vocabulary.codes.stop] == recorded["image_ids"]
        assert [vocabulary.text_tokens.start, vocabulary.text_tokens.stop] == recorded["text_ids"]
        assert vocabulary.num_tokens == recorded["num_tokens"]
        assert vocabulary.size == recorded["padded_to_128"]

    def test_command_tokens(self, recorded, vocabulary) -> None:
        assert {name: vocabulary.command(name) for name in COMMANDS} == recorded["command_ids"]
        assert len(COMMANDS) == recorded["n_command"]

    def test_text_tokenizer_is_the_recorded_one(self, recorded, tokenizer) -> None:
        assert tokenizer.identity == recorded["text_model"]["sha256"]
        assert len(tokenizer.serialized) == recorded["text_model"]["bytes"]
        assert tokenizer.vocab_size == recorded["n_text"]

    def test_saved_text_tokenizer_is_the_same_file(self, recorded, tokenizer, tmp_path) -> None:
        tokenizer.save(tmp_path / "text.model")
        saved = (tmp_path / "text.model").read_bytes()
        assert hashlib.sha256(saved).hexdigest() == recorded["text_model"]["sha256"]


class TestStrings:
    def test_pieces_and_their_text(self, parity, tokenizer) -> None:
        for record in parity.json("text/encode.json"):
            assert tokenizer.encode(record["text"]) == record["sp_ids"], record["text"]
            assert tokenizer.decode(record["sp_ids"]) == record["decoded"]

    def test_ids_of_the_joint_vocabulary(self, parity, tokenizer, vocabulary) -> None:
        layout = template("[ROI1] {text}", "text", vocabulary)
        for record in parity.json("text/encode.json"):
            tokens = layout.build({"text": tokenizer.encode(record["text"])}).tokens.tolist()
            assert tokens == [vocabulary.command("[ROI1]"), *record["ids"]], record["text"]


class TestTrainingRows:
    def rows(self, parity, kind: str) -> list[dict[str, Any]]:
        found = [record for record in parity.json("text/templates.json") if record["kind"] == kind]
        assert found
        return found

    def test_text_and_codes(self, parity, tokenizer, vocabulary) -> None:
        for row in self.rows(parity, "text_code"):
            edge = math.isqrt(len(row["codes"]))
            layout = f"[ROI1] {{text}} {SIZE[edge]} [BOI1] {{image:{edge}x{edge}}} [EOI1]"
            values = {"text": tokenizer.encode(row["text"]), "image": row["codes"]}
            assert template(layout, "image", vocabulary).build(values).tokens.tolist() == row["ids"]

    def test_codes_and_codes(self, parity, tokenizer, vocabulary) -> None:
        for row in self.rows(parity, "code_to_code"):
            words = row["text"].split(" ")
            start = list(takewhile(COMMANDS.__contains__, words))  # the recorded query brings its command tokens along
            small, large = (math.isqrt(len(row[name])) for name in ("codes0", "codes1"))
            layout = (
                f"{' '.join(start)} {{text}} {SIZE[small]} [BOI1] {{small:{small}x{small}}} [EOI1] "
                f"{SIZE[large]} [BOI2] {{large:{large}x{large}}} [EOI2]"
            )
            text = tokenizer.encode(" ".join(words[len(start) :]))
            values = {"text": text, "small": row["codes0"], "large": row["codes1"]}
            assert template(layout, "large", vocabulary).build(values).tokens.tolist() == row["ids"]

    def test_text_alone(self, parity, tokenizer, vocabulary) -> None:
        """A layout of ours begins with a command token, for the first text token has to follow something."""
        for row in self.rows(parity, "pure_text"):
            tokens = template("[ROI1] {text} [SEP]", "text", vocabulary).build({"text": tokenizer.encode(row["text"])})
            assert tokens.tokens[1:].tolist() == row["ids"]


GENERATE = {
    "text_to_image": (
        r"\[ROI1\] (?P<text>.*) \[BASE\] \[BOI1\] \[MASK\]\*(?P<open>\d+)",
        "[ROI1] {text} [BASE] [BOI1] {image:1xOPEN} [EOI1]",
        "image",
    ),
    "image_to_text": (
        r"\[BASE\] \[BOI1\] \[Image\d*\]\S+ \[EOI1\] \[ROI1\] \[MASK\]\*(?P<open>\d+)",
        "[BASE] [BOI1] {given:1xGIVEN} [EOI1] [ROI1] {text} [SEP]",
        "text",
    ),
    "low_level_super_resolution": (
        r"\[ROI1\] (?P<text>.*) \[BASE\] \[BOI1\] \[Image\]\S+ \[EOI1\] \[ROI2\] \[POS0\] \[BASE\] \[BOI2\] "
        r"\[MASK\]\*(?P<open>\d+)",
        "[ROI1] {text} [BASE] [BOI1] {given:1xGIVEN} [EOI1] [ROI2] [POS0] [BASE] [BOI2] {large:1xOPEN} [EOI2]",
        "large",
    ),
}
"""Task that fills a slot → the original's query, the layout that says the same, its target."""

COMPLETE = {
    "rerank": (
        r"\[BASE\] \[BOI1\] \[Image\]\S+ \[EOI1\] \[ROI1\] (?!\[MASK\])(?P<text>.+)",
        "[BASE] [BOI1] {given:1xGIVEN} [EOI1] [ROI1] {text}",
    ),
    "rerank_text": (r"\[EOI1\] \[ROI1\] (?P<text>.*)", "[EOI1] [ROI1] {text}"),
    # What magnify starts from stands at the beginning of a query for super-resolution.
    "magnify": (r"\[ROI1\] (?P<text>.*) \[BASE\] \[BOI1\] \[Image\].*", "[ROI1] {text} [BASE] [BOI1] {given:1xGIVEN}"),
}
"""Task that reads a whole row → the original's query, the layout that says the same."""


def queries(parity, pattern: str = ".*") -> list[tuple[re.Match[str], list[int], Vocabulary]]:
    """Recorded queries that the original could read and that match: the match, the ids, and what they mean."""
    text_vocab_size = parity.json("text/vocabulary.json")["n_text"]
    plain, images = parity.json("text/parse_query.json"), parity.json("text/parse_query_images.json")
    found = [
        (re.fullmatch(pattern, case["query"], re.DOTALL), case["ids"], Vocabulary(file["n_img"], text_vocab_size))
        for file, cases in ((plain, plain["queries"].values()), (images, images["queries"]))
        for case in cases
        if "ids" in case
    ]
    kept = [(match, ids, vocabulary) for match, ids, vocabulary in found if match is not None]
    assert kept, f"no recorded query matches {pattern}"
    return kept


def given_codes(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """The codes of the image in a query, -1 where one is open; empty where no image is given."""
    start, end = vocabulary.command("[BOI1]"), vocabulary.command("[EOI1]")
    return ids[ids.index(start) + 1 : ids.index(end)] if {start, end} <= set(ids) else []


@pytest.mark.parametrize("task", GENERATE)
def test_prompt_of_a_task_is_the_originals_query(task: str, parity, tokenizer) -> None:
    pattern, layout, target = GENERATE[task]
    for match, ids, vocabulary in queries(parity, pattern):
        codes, num_open = given_codes(ids, vocabulary), int(match["open"])
        sized = layout.replace("OPEN", str(num_open)).replace("GIVEN", str(len(codes)))
        values = {"text": tokenizer.encode(match.groupdict().get("text", "")), "given": codes}
        assert template(sized, target, vocabulary).prompt(values) + [OPEN] * num_open == ids, match[0]


@pytest.mark.parametrize("task", COMPLETE)
def test_row_of_a_task_is_the_originals_query(task: str, parity, tokenizer) -> None:
    pattern, layout = COMPLETE[task]
    for match, ids, vocabulary in queries(parity, pattern):
        codes = given_codes(ids, vocabulary)
        sized = layout.replace("GIVEN", str(len(codes)))
        row = template(sized, "text", vocabulary).build({"text": tokenizer.encode(match["text"]), "given": codes})
        assert row.tokens.tolist() == (ids[: len(row.tokens)] if task == "magnify" else ids), match[0]


class TestTextStaysText:
    """The original reads `[BOI1]` and `[MASK]*5` between spaces of a user's text as commands; we never do."""

    def test_nothing_in_a_query_becomes_a_command(self, parity, tokenizer, vocabulary) -> None:
        layout = template("[ROI1] {text} [BASE] [BOI1] {image:1x1} [EOI1]", "image", vocabulary)
        interpreted = 0
        for match, ids, recorded_with in queries(parity):
            start, *text, base, boi = layout.prompt({"text": tokenizer.encode(match[0])})
            assert [start, base, boi] == [vocabulary.command(name) for name in ("[ROI1]", "[BASE]", "[BOI1]")]
            assert all(token in vocabulary.text_tokens for token in text), match[0]
            if all(token in recorded_with.text_tokens for token in ids):
                shift = vocabulary.codebook_size - recorded_with.codebook_size
                assert text == [token + shift for token in ids], match[0]
            else:
                interpreted += 1
        assert interpreted


@pytest.mark.all_records
class TestShippedTemplates:
    """What `model=cogview_4b template=…` lays out, in the original's ids."""

    def compose(self, name: str) -> tuple[Template, int]:
        """The template and the edge of the grid of codes."""
        register_schemas()
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose("config", ["task=pretrain", "model=cogview_4b", f"template={name}"])
        options: Any = OmegaConf.to_container(config.template, resolve=True)
        sizes = Vocabulary(config.image_tokenizer.codebook_size, config.text.vocab_size)
        composed = Template(**options, vocabulary=sizes, text_length=config.text.max_length)
        return composed, config.image_tokenizer.image_size // config.image_tokenizer.downsampling

    def text(self, parity, composed: Template) -> dict[str, Any]:
        """The longest recorded string that fits into the text slot."""
        room = composed.slot("text").length
        records = [record for record in parity.json("text/encode.json") if len(record["sp_ids"]) <= room]
        return max(records, key=lambda record: len(record["sp_ids"]))

    def row(self, recorded: dict[str, Any], parts: list[str | list[int]]) -> list[int]:
        """Command tokens by their recorded ids, other ids as they are."""
        commands = recorded["command_ids"]
        return [i for part in parts for i in ([commands[part]] if isinstance(part, str) else part)]

    def test_text_image(self, parity, recorded) -> None:
        composed, edge = self.compose("text_image")
        text = self.text(parity, composed)
        codes = list(range(edge * edge))
        sequence = composed.build({"text": text["sp_ids"], "image": codes})
        start: list[str | list[int]] = ["[ROI1]", text["ids"], SIZE[edge], "[BOI1]"]
        assert sequence.tokens.tolist() == self.row(recorded, [*start, codes, "[EOI1]"])
        assert composed.prompt({"text": text["sp_ids"]}) == self.row(recorded, start)

    def test_image_text(self, parity, recorded) -> None:
        composed, edge = self.compose("image_text")
        text = self.text(parity, composed)
        codes = list(range(edge * edge))
        sequence = composed.build({"text": text["sp_ids"], "image": codes})
        start: list[str | list[int]] = [SIZE[edge], "[BOI1]", codes, "[EOI1]", "[ROI1]"]
        assert sequence.tokens.tolist() == self.row(recorded, [*start, text["ids"], "[SEP]"])
        assert composed.prompt({"image": codes}) == self.row(recorded, start)

    def test_super_resolution(self, parity, recorded) -> None:
        composed, edge = self.compose("super_resolution")
        text = self.text(parity, composed)
        small, large = list(range((edge // 2) ** 2)), list(range(edge * edge))
        values = {"text": text["sp_ids"], "small": small}
        sequence = composed.build({**values, "large": large})
        before: list[str | list[int]] = ["[ROI1]", text["ids"], SIZE[edge], "[BOI1]", small, "[EOI1]"]
        start = [*before, "[ROI2]", "[POS0]", SIZE[edge], "[BOI2]"]
        assert sequence.tokens.tolist() == self.row(recorded, [*start, large, "[EOI2]"])
        assert composed.prompt(values) == self.row(recorded, start)
        restart = len(self.row(recorded, before))
        assert sequence.positions.tolist() == [*range(restart), *range(len(sequence.tokens) - restart)]
