"""Which layouts can be trained, and which texts they ask samples for."""

from __future__ import annotations

import pytest

from cogview_pl.errors import UserError
from cogview_pl.vocab import Template, Vocabulary, caption_slots
from cogview_pl.vocab.config import TemplateConfig
from cogview_pl.vocab.roles import check_trainable, text_fields

PAIR = "[ROI1] {text} [BOI1] {small:2x2} [EOI1] [BOI2] {large:4x4} [EOI2]"


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("[ROI1] {text} [BOI1] {image:2x2}", ("text",)),
        ("[ROI1] {prompt} [BOI1] {image:2x2}", ("text",)),
        ("[BOI1] {image:2x2}", ("text",)),
        ("[BOI1] {image:2x2} {question} [SEP] {answer}", ("question", "answer")),
        ("[ROI1] {text} [SEP] {title} [BOI1] {image:2x2}", ("text", "title")),
    ],
)
def test_texts_of_a_layout(layout: str, fields: tuple[str, ...]) -> None:
    assert text_fields(layout) == fields


def test_one_image_or_a_pair_for_super_resolution_can_be_trained() -> None:
    check_trainable(TemplateConfig(layout=PAIR, target="large", loss={}))
    check_trainable(TemplateConfig(layout="[BOI1] {image:2x2} {question} [SEP] {answer}", target="answer", loss={}))


@pytest.mark.parametrize(
    ("layout", "target"),
    [
        (PAIR, "small"),
        (PAIR, "text"),
        (PAIR, "nothing"),
        (PAIR.replace("4x4", "4x2"), "large"),
        (PAIR.replace("4x4", "2x2"), "large"),
        (PAIR.replace("{text}", "{text} [SEP] {title}"), "large"),
        (f"{PAIR} [BOI3] {{huge:8x8}} [EOI3]", "huge"),
    ],
)
def test_other_image_slots_are_refused(layout: str, target: str) -> None:
    with pytest.raises(
        UserError, match=r"^template\.layout: the image slots small, large.* are no pair for super-resol"
    ):
        check_trainable(TemplateConfig(layout=layout, target=target, loss={}))


def test_a_captioner_writes_one_text() -> None:
    layout = "[BOI1] {image:2x2} {question} [SEP] {answer}"
    template = Template(layout, target="answer", loss={}, vocabulary=Vocabulary(4, 4), text_length=2)
    with pytest.raises(UserError, match="does not write one text about one image; give a run of task=caption"):
        caption_slots(template)


def test_a_quirk_of_the_original_takes_one_text() -> None:
    layout = "[BOI1] {image:2x2} {question} [SEP] {answer}"
    with pytest.raises(UserError, match=r"^compat\.loss_by_input=true: this layout has several text slots"):
        Template(layout, target="answer", loss={}, vocabulary=Vocabulary(4, 4), text_length=2, loss_by_input=True)
