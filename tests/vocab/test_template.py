"""Templates: every layout of `conf/template` and one with two images keep the promises of the parsed layout."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from omegaconf import OmegaConf

from cogview_pl.config.schema import register_schemas
from cogview_pl.errors import UserError
from cogview_pl.vocab import CodeSlot, Sequence, Template, TextSlot, Vocabulary
from cogview_pl.vocab.template import NO_SLOT

CONF = Path(__file__).parents[2] / "conf" / "template"
GRID = 4
TEXT_LENGTH = 6
VOCABULARY = Vocabulary(codebook_size=70, text_vocab_size=10)

TEXT_TOKENS = [3, 0, 9]
"""Text of the golden lines; codes count up from 0."""


def settings(name: str) -> dict[str, Any]:
    """The arguments of a template, as the command line composes them."""
    if name == "two_images":
        return {
            "layout": ("[ROI1] {text} [BASE] [BOI1] {small:4x4} [EOI1] [ROI2] [POS0] [BASE] [BOI2] {large:8x8} [EOI2]"),
            "target": "large",
            "loss": {"large": 1.0},
            "restart_positions_at": "[ROI2]",
        }
    register_schemas()  # and with them what the files use besides plain values
    config = OmegaConf.load(CONF.parent / "compat" / "none.yaml")
    config.image_tokenizer = {"image_size": 8 * GRID, "downsampling": 8}
    config.template = OmegaConf.load(CONF / f"{name}.yaml")
    return OmegaConf.to_container(config, resolve=True)["template"]  # type: ignore[index,call-overload,return-value]


def make(name: str, **changes: Any) -> Template:
    return Template(**{**settings(name), **changes}, vocabulary=VOCABULARY, text_length=TEXT_LENGTH)


class Listed(NamedTuple):
    """A sequence as lists."""

    tokens: list[int]
    weights: list[float]
    slots: list[int]
    positions: list[int]


def listed(sequence: Sequence) -> Listed:
    assert [column.dtype for column in sequence] == ["int64", "float32", "int64", "int64"]
    return Listed(*(column.tolist() for column in sequence))


def commands(*names: str) -> list[int]:
    return [VOCABULARY.command(f"[{name}]") for name in names]


TEXT = [70 + 3, 70 + 0, 70 + 9]
GOLDEN = {
    "text_image": [*commands("ROI1"), *TEXT, *commands("BASE", "BOI1"), *range(16), *commands("EOI1")],
    "image_text": [*commands("BASE", "BOI1"), *range(16), *commands("EOI1", "ROI1"), *TEXT, *commands("SEP")],
    "super_resolution": [
        *commands("ROI1"),
        *TEXT,
        *commands("BASE", "BOI1"),
        *range(4),
        *commands("EOI1", "ROI2", "POS0", "BASE", "BOI2"),
        *range(16),
        *commands("EOI2"),
    ],
    "image_to_image": [
        *commands("ROI1"),
        *TEXT,
        *commands("BASE", "BOI1"),
        *range(16),
        *commands("EOI1", "ROI2", "BASE", "BOI2"),
        *range(16),
        *commands("EOI2"),
    ],
    "two_images": [
        *commands("ROI1"),
        *TEXT,
        *commands("BASE", "BOI1"),
        *range(16),
        *commands("EOI1", "ROI2", "POS0", "BASE", "BOI2"),
        *range(64),
        *commands("EOI2"),
    ],
}
"""One line per layout: add one with every new layout."""

NAMES = sorted({path.stem for path in CONF.glob("*.yaml")} | {"two_images"})


def random_values(template: Template, rng: random.Random) -> dict[str, list[int]]:
    """Text of 0 … capacity text tokens and codes."""
    values = {}
    for slot in template.slots:
        text = isinstance(slot, TextSlot)
        count = rng.randint(0, slot.length) if text else slot.length
        values[slot.name] = rng.choices(
            range(VOCABULARY.text_vocab_size if text else VOCABULARY.codebook_size), k=count
        )
    return values


def golden_values(template: Template) -> dict[str, list[int]]:
    return {
        slot.name: TEXT_TOKENS if isinstance(slot, TextSlot) else list(range(slot.length)) for slot in template.slots
    }


@pytest.mark.parametrize("name", NAMES)
class TestEveryLayout:
    def test_golden_tokens(self, name: str) -> None:
        template = make(name)
        assert template.build(golden_values(template)).tokens.tolist() == GOLDEN[name]

    def test_prompt_is_a_prefix_of_the_training_sequence(self, name: str) -> None:
        template, rng = make(name), random.Random(0)
        for _ in range(300):
            values = random_values(template, rng)
            sequence = listed(template.build(values))
            prompt = template.prompt({key: ids for key, ids in values.items() if key != template.target.name})
            assert prompt == sequence.tokens[: len(prompt)]
            assert template.positions(prompt) == sequence.positions[: len(prompt)]
            # The slot starts right behind its prompt.
            ids = values[template.target.name]
            first = VOCABULARY.text_tokens.start if isinstance(template.target, TextSlot) else 0
            assert sequence.tokens[len(prompt) : len(prompt) + len(ids)] == [first + i for i in ids]

    def test_weights_and_slots_mark_the_same_tokens(self, name: str) -> None:
        template, rng = make(name), random.Random(1)
        loss = settings(name)["loss"]
        for _ in range(100):
            values = random_values(template, rng)
            sequence = listed(template.build(values))
            assert len({len(column) for column in sequence}) == 1
            for token, weight, slot in zip(sequence.tokens, sequence.weights, sequence.slots, strict=True):
                if slot == NO_SLOT:
                    assert weight == 0.0
                    assert token >= VOCABULARY.text_tokens.stop
                else:
                    assert weight == loss.get(template.slots[slot].name, 0.0)
                    assert any(token in span for span in template.allowed(template.slots[slot]))
            for index, hole in enumerate(template.slots):
                closed = isinstance(hole, TextSlot)  # by one more token
                assert sequence.slots.count(index) == len(values[hole.name]) + closed

    def test_tokens_with_loss_are_predicted_among_ids_that_hold_them(self, name: str) -> None:
        template = make(name)
        built = listed(template.build(golden_values(template)))
        for token, weight, slot in zip(built.tokens, built.weights, built.slots, strict=True):
            assert weight == 0 or token in template.predicted(template.slots[slot])

    def test_token_that_closes_a_text_belongs_to_it(self, name: str) -> None:
        template = make(name)
        text = next(slot for slot in template.slots if isinstance(slot, TextSlot))
        sequence = listed(template.build({**golden_values(template), text.name: []}))
        index = template.slots.index(text)
        place = sequence.slots.index(index)
        assert sequence.tokens[place] == template.end_of_text(text)
        assert sequence.weights[place] == settings(name)["loss"].get(text.name, 0.0)
        assert template.allowed(text) == (
            VOCABULARY.text_tokens,
            range(sequence.tokens[place], sequence.tokens[place] + 1),
        )

    def test_long_captions_are_cut_in_training_and_refused_in_prompts(self, name: str) -> None:
        template = make(name)
        values = golden_values(template)
        values["text"] = [1] * (TEXT_LENGTH + 5)
        longest = template.build({**values, "text": [1] * TEXT_LENGTH})
        assert listed(template.build(values)) == listed(longest)
        assert len(template.build(values).tokens) == template.length
        if template.target.name != "text":
            with pytest.raises(UserError, match=r"^prompts: one has 11 text tokens, [^\n]* holds 6; [^\n]+$"):
                template.prompt(values)

    def test_position_table_that_it_asks_for_suffices(self, name: str) -> None:
        template, rng = make(name), random.Random(2)
        longest = template.build({**golden_values(template), "text": [1] * TEXT_LENGTH})
        assert max(longest.positions) + 1 == template.num_positions
        for _ in range(50):
            assert max(template.build(random_values(template, rng)).positions) < template.num_positions

    def test_every_command_token_may_restart_the_positions(self, name: str) -> None:
        for element in make(name).elements:
            if isinstance(element, str):
                template = make(name, restart_positions_at=element)
                sequence = listed(template.build({**golden_values(template), "text": [1] * TEXT_LENGTH}))
                assert sequence.positions[sequence.tokens.index(VOCABULARY.command(element))] == 0
                assert max(sequence.positions) < template.num_positions, f"restart at {element}"


def test_every_layout_has_a_golden_line() -> None:
    assert set(NAMES) == set(GOLDEN)


class TestWeights:
    def test_text_and_image(self) -> None:
        template = make("text_image", loss={"text": 0.5, "image": 2.0})
        sequence = listed(template.build({"text": [1, 2], "image": [0] * 16}))
        #                           [ROI1] text tokens     [BASE] [BOI1]  codes  [EOI1]
        assert sequence.weights == [0.0, 0.5, 0.5, 0.5, 0.0, *[2.0] * 16, 0.0]
        assert sequence.slots == [-1, 0, 0, 0, -1, *[1] * 16, -1]

    def test_slot_without_a_weight_carries_no_loss(self) -> None:
        template = make("two_images")
        sequence = listed(template.build(golden_values(template)))
        assert sum(weight > 0 for weight in sequence.weights) == 64
        assert all(slot == 2 for slot, weight in zip(sequence.slots, sequence.weights, strict=True) if weight > 0)


class TestPositions:
    def test_count_up_without_a_restart(self) -> None:
        template = make("text_image")
        sequence = listed(template.build({"text": [1, 2], "image": [0] * 16}))
        assert sequence.positions == list(range(len(sequence.tokens)))

    def test_start_again_at_the_restart_token(self) -> None:
        template = make("two_images")
        sequence = listed(template.build({"text": [1, 2], "small": [0] * 16, "large": [0] * 64}))
        # [ROI1] + 2 text tokens + [BASE] [BOI1] + 16 codes + [EOI1] come before [ROI2].
        assert sequence.positions == [*range(22), *range(4 + 64 + 1)]
        assert template.num_positions == 4 + 64 + 1

    def test_prompt_that_ends_before_the_restart_token(self) -> None:
        template = make("two_images", target="small")
        assert template.positions(template.prompt({"text": [1, 2]})) == [0, 1, 2, 3, 4]


class TestQuirksOfTheOriginal:
    LAYOUT = "[ROI1] {text} [BASE] [BOI1] {small:1x2} [EOI1] [ROI2] [BOI2] {large:2x2} [EOI2]"
    VALUES: ClassVar = {"text": [1, 2], "small": [5, 6], "large": [7, 8, 9, 10]}

    def quirky(self, **options: Any) -> Template:
        loss = {"text": 0.5, "large": 2.0}
        return make("two_images", layout=self.LAYOUT, loss=loss, **options)

    def test_the_weight_of_a_prediction_follows_its_input(self) -> None:
        sequence = listed(self.quirky(loss_by_input=True).build(self.VALUES))
        # Made from:        (nothing), [ROI1] 2 text tokens [BASE] [BOI1], 2 codes, [EOI1] [ROI2] [BOI2], 4 codes
        assert sequence.weights == [0.0, *[0.5] * 5, *[0.0] * 2, *[0.5] * 3, *[2.0] * 4]
        assert sequence.slots == [NO_SLOT, *[0] * 5, *[1] * 2, *[0] * 3, *[2] * 4]
        plain = listed(self.quirky().build(self.VALUES))
        assert (sequence.tokens, sequence.positions) == (plain.tokens, plain.positions)
        assert plain.weights == [0.0, *[0.5] * 3, *[0.0] * 6, *[2.0] * 4, 0.0]

    def test_a_layout_without_text_has_no_text_to_give_weight_to(self) -> None:
        text_behind = make("image_text", loss={"text": 0.5}, loss_by_input=True)
        sequence = listed(text_behind.build({"text": [3], "image": [0] * 16}))
        assert sequence.slots == [NO_SLOT, 1, 1, *[0] * 16, *[1] * 3]  # the only text, whichever slot it is

    def test_the_restart_token_of_a_prompt_may_keep_its_place(self) -> None:
        prompt = self.quirky().prompt(self.VALUES)
        assert len(prompt) == 10 and prompt[8] == VOCABULARY.command("[ROI2]")
        counted = [*range(8), 0, 1]
        for quirk, expected in ((False, counted), (True, [*range(9), 1])):
            template = self.quirky(restart_after_token=quirk)
            assert template.prompt_positions(prompt) == expected
            assert template.positions(prompt) == counted  # in training
            assert template.prompt_positions(prompt[:6]) == list(range(6))
        assert self.quirky().prompt_positions(prompt) == counted
        assert self.quirky(restart_positions_at=None, restart_after_token=True).prompt_positions(prompt) == [*range(10)]

    def test_positions_start_where_the_restart_token_does_not_come(self) -> None:
        assert self.quirky(restart_positions_at="[ROI1]").positions([5, 6, 7]) == [0, 1, 2]
        assert self.quirky().num_positions == 1 + TEXT_LENGTH + 2 + 2 + 1
        assert self.quirky(restart_positions_at=None).num_positions == self.quirky().length == 19


class TestAllowed:
    def test_loss_is_taken_over_codes_or_over_all_else(self) -> None:
        template = make("text_image")
        assert template.predicted(template.slot("image")) == range(70)
        assert template.predicted(template.slot("text")) == range(70, 128)  # with the rows that pad the table

    def test_text_is_closed_by_the_token_behind_it(self) -> None:
        template = make("text_image")
        base = VOCABULARY.command("[BASE]")
        text = template.slot("text")
        assert isinstance(text, TextSlot) and template.end_of_text(text) == base
        assert template.allowed(text) == (range(70, 80), range(base, base + 1))

    def test_text_before_a_grid_has_no_closing_token(self) -> None:
        template = make("text_image", layout="[BOI1] {text} {image:4x4}")
        text = template.slot("text")
        assert isinstance(text, TextSlot) and template.end_of_text(text) is None

    def test_codes(self) -> None:
        template = make("text_image")
        assert template.allowed(template.slot("image")) == (range(70),)

    def test_text_at_the_end_of_a_layout_has_no_closing_token(self) -> None:
        template = make("image_text", layout="[BOI1] {image:4x4} [EOI1] {text}")
        text = template.slot("text")
        assert isinstance(text, TextSlot)
        assert template.end_of_text(text) is None
        assert template.allowed(text) == (VOCABULARY.text_tokens,)


class TestErrors:
    @pytest.mark.parametrize(
        "word",
        ["BOI1", "[BOI9]", "[boi1]", "{image:4}", "{image:4x}", "{Text}", "{}", "[BOI1]{x}", "{a:-1x4}", "{a:0x4}"],
    )
    def test_unreadable_word(self, word: str) -> None:
        with pytest.raises(UserError, match=r"^template\.layout: [^\n]+$") as caught:
            make("text_image", layout="[ROI1] {text} [BOI1] {image:4x4} " + word)
        assert word in str(caught.value)

    def test_unknown_target(self) -> None:
        with pytest.raises(UserError, match=r"^template\.target: [^\n]*no slot drawing[^\n]*text, image$"):
            make("text_image", target="drawing")

    def test_unknown_loss(self) -> None:
        with pytest.raises(UserError, match=r"^template\.loss: [^\n]*no slot drawing[^\n]*text, image$"):
            make("text_image", loss={"drawing": 1.0})

    def test_two_slots_of_one_name(self) -> None:
        with pytest.raises(UserError, match=r"^template\.layout: [^\n]*image, image$"):
            make("text_image", layout="[BOI1] {image:4x4} [BOI2] {image:4x4}")

    def test_restart_token_that_the_layout_lacks(self) -> None:
        with pytest.raises(UserError, match=r"^template\.restart_positions_at=\[ROI3\] [^\n]+$"):
            make("text_image", restart_positions_at="[ROI3]")

    def test_layout_without_slots(self) -> None:
        with pytest.raises(UserError, match=r"^template\.target: [^\n]+$"):
            make("text_image", layout="[ROI1] [BOI1]", loss={})

    def test_nothing_before_the_target(self) -> None:
        with pytest.raises(UserError, match=r"^template\.layout: nothing stands before the target image; begin with a"):
            make("text_image", layout="{image:4x4} {text}")
        assert make("text_image", layout="{text} {image:4x4}").prompt({"text": [2]}) == [72]

    @pytest.mark.parametrize("count", [0, 15, 17])
    def test_wrong_number_of_codes(self, count: int) -> None:
        with pytest.raises(ValueError, match=f"image.*got {count}"):
            make("text_image").build({"text": [1], "image": [0] * count})


def test_a_grid_is_high_then_wide() -> None:
    template = make("text_image", layout="[ROI1] {text} [BOI1] {image:2x12}")
    assert template.slot("image") == CodeSlot("image", (2, 12))
    assert template.slot("image").length == 24


def test_commands_behind_a_text_belong_to_it_but_once() -> None:
    template = make("text_image", layout="[ROI1] {text} [BASE] [SEP] [BOI1] {image:1x2} [EOI1]")
    assert template.build({"text": [], "image": [0, 1]}).slots.tolist() == [-1, 0, -1, -1, 1, 1, -1]


def test_slots_know_their_size() -> None:
    template = make("two_images")
    assert template.slots == [TextSlot("text", 6), CodeSlot("small", (4, 4)), CodeSlot("large", (8, 8))]
    assert template.length == 1 + 6 + 2 + 16 + 1 + 4 + 64 + 1
