"""The purpose of a layout: which slots training, captions and super-resolution need."""

from __future__ import annotations

from cogview_pl.errors import UserError
from cogview_pl.vocab.config import TemplateConfig
from cogview_pl.vocab.template import CodeSlot, Slot, Template, TextSlot, parse_slots

CAPTION = "text"
"""Name of the text that is the caption of an image: a slot `{text}` and the text field of a sample."""


def slot_names(layout: str) -> list[str]:
    """Names of the slots of a layout, in order."""
    return [slot.name for slot in parse_slots(layout, text_length=1)]


def text_fields(layout: str) -> tuple[str, ...]:
    """Names of the texts that samples need for a layout.

    One text slot takes the caption, whatever its name; several take the texts of their names.
    """
    names = tuple(slot.name for slot in parse_slots(layout, text_length=1) if isinstance(slot, TextSlot))
    return names if len(names) > 1 else (CAPTION,)


def check_trainable(config: TemplateConfig) -> None:
    """Raises UserError for a layout whose image slots are neither a super-resolution pair nor images of one size."""
    slots = parse_slots(config.layout, text_length=1)
    grids = [slot.name for slot in slots if isinstance(slot, CodeSlot)]
    target = next((slot for slot in slots if slot.name == config.target), None)
    if len(grids) > 1 and (target is None or not (_magnify_slots(slots, target) or _inputs(slots, target))):
        raise UserError(
            f"template.layout: the image slots {', '.join(grids)} are no pair for super-resolution, and not the target "
            "with images of its size; write one image slot, or a grid and the target grid of the same size, or {text}, "
            "a grid, and the target grid of twice its edge"
        )


def image_fields(layout: str, target: str) -> tuple[str, ...]:
    """Names of the images that samples need besides their own: image slots of the size of the target's grid.

    The target takes the image of a sample. A layout with one image slot, or those of super-resolution, needs no other.
    """
    slots = parse_slots(layout, text_length=1)
    found = next((slot for slot in slots if slot.name == target), None)
    return () if found is None else tuple(slot.name for slot in _inputs(slots, found))


def is_text_to_image(template: Template) -> bool:
    """Whether a layout is one text, then one image: the layout of pretraining and style finetuning."""
    text, *grids = template.slots
    return isinstance(text, TextSlot) and len(grids) == 1 and grids[0] == template.target


def source_slots(template: Template) -> tuple[str, str] | None:
    """Names of the text and of the source image of a layout that makes an image from an image; None for any other."""
    texts = [slot.name for slot in template.slots if isinstance(slot, TextSlot)]
    sources = _inputs(template.slots, template.target)
    if len(texts) != 1 or len(sources) != 1 or template.slots[-1] != template.target:
        return None
    return texts[0], sources[0].name


def makes_images(template: Template) -> bool:
    """Whether a layout makes an image from a text, or from a text and a source image."""
    return is_text_to_image(template) or source_slots(template) is not None


def caption_slots(template: Template) -> tuple[str, str]:
    """Names of the text slot and the image slot of a captioner; raises UserError for any other layout."""
    grids = [slot.name for slot in template.slots if isinstance(slot, CodeSlot)]
    texts = [slot.name for slot in template.slots if isinstance(slot, TextSlot)]
    if not isinstance(template.target, TextSlot) or len(grids) != 1 or len(texts) != 1:
        raise UserError(
            f"this model's layout, {template.layout}, does not write one text about one image; give a run of "
            "task=caption"
        )
    return texts[0], grids[0]


def magnify_slots(template: Template) -> tuple[str, str]:
    """Names of the text slot and the small grid; raises UserError for a layout that is not super-resolution."""
    found = _magnify_slots(template.slots, template.target)
    if found is None:
        raise UserError(
            f"this model's layout, {template.layout}, is not one of super-resolution (a grid, then one of twice its "
            "edge); give a run of task=super_resolution"
        )
    return found


def _inputs(slots: list[Slot], target: Slot) -> list[CodeSlot]:
    """The grids besides the target, where all have its size; none for any other layout."""
    grids = [slot for slot in slots if isinstance(slot, CodeSlot) and slot != target]
    same = isinstance(target, CodeSlot) and all(slot.grid == target.grid for slot in grids)
    return grids if same else []


def _magnify_slots(slots: list[Slot], target: Slot) -> tuple[str, str] | None:
    """Names of the text slot and the small grid of super-resolution; None for any other layout."""
    texts = [slot.name for slot in slots if isinstance(slot, TextSlot)]
    grids = [slot for slot in slots if isinstance(slot, CodeSlot) and slot != target]
    if len(texts) != 1 or len(grids) != 1 or not isinstance(target, CodeSlot):
        return None
    y, x = grids[0].grid
    return (texts[0], grids[0].name) if (2 * y, 2 * x) == target.grid else None
