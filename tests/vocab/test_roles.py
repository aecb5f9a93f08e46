"""Which layouts can be trained, and which texts they ask samples for."""

from __future__ import annotations

import pytest

from cogview_pl.errors import UserError
from cogview_pl.vocab import Template, Vocabulary, caption_slots, is_text_to_image, makes_images, source_slots
from cogview_pl.vocab.config import TemplateConfig
from cogview_pl.vocab.roles import check_trainable, image_fields, text_fields

PAIR = "[ROI1] {text} [BOI1] {small:2x2} [EOI1] [BOI2] {large:4x4} [EOI2]"
SOURCE = "[ROI1] {text} [BOI1] {source:2x2} [EOI1] [BOI2] {image:2x2} [EOI2]"


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


@pytest.mark.parametrize(
    ("layout", "target", "images"),
    [
        (PAIR, "large", ()),
        ("[BOI1] {image:2x2} {question} [SEP] {answer}", "answer", ()),
        ("[BOI1] {image:2x2}", "image", ()),
        (SOURCE, "image", ("source",)),
        (SOURCE, "source", ("image",)),
        ("[BOI1] {one:2x2} [BOI2] {two:2x2} [BOI3] {image:2x2}", "image", ("one", "two")),
    ],
)
def test_layouts_that_can_be_trained_and_their_further_images(
    layout: str, target: str, images: tuple[str, ...]
) -> None:
    check_trainable(TemplateConfig(layout=layout, target=target, loss={}))
    assert image_fields(layout, target) == images


@pytest.mark.parametrize(
    ("layout", "target", "names"),
    [
        (SOURCE, "image", ("text", "source")),
        (SOURCE.replace("{text}", "{words}").replace("{source", "{photo"), "image", ("words", "photo")),
        (SOURCE, "source", None),  # the target is read before the other image
        (PAIR, "large", None),
        (SOURCE.replace("{text}", "{text} [SEP] {title}"), "image", None),
        ("[BOI1] {one:2x2} [BOI2] {two:2x2} [ROI1] {text} [BOI3] {image:2x2}", "image", None),
    ],
)
def test_a_text_and_a_source_image_before_the_target(layout: str, target: str, names: tuple[str, str] | None) -> None:
    template = Template(layout, target=target, loss={}, vocabulary=Vocabulary(4, 4), text_length=2)
    assert source_slots(template) == names
    assert makes_images(template) == (names is not None) and not is_text_to_image(template)


@pytest.mark.parametrize(
    ("layout", "target"),
    [
        (PAIR, "small"),
        (PAIR, "text"),
        (PAIR, "nothing"),
        (PAIR.replace("4x4", "4x2"), "large"),
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
