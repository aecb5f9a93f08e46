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
    """Raises UserError for a layout with several image slots that are not a super-resolution pair."""
    slots = parse_slots(config.layout, text_length=1)
    grids = [slot.name for slot in slots if isinstance(slot, CodeSlot)]
    target = next((slot for slot in slots if slot.name == config.target), None)
    if len(grids) > 1 and (target is None or _magnify_slots(slots, target) is None):
        raise UserError(
            f"template.layout: the image slots {', '.join(grids)} are no pair for super-resolution, and other layouts "
            "hold one image; write one image slot, or {text}, a grid, and the target grid of twice its edge"
        )


def is_text_to_image(template: Template) -> bool:
    """Whether a layout is one text, then one image: the layout of pretraining and style finetuning."""
    text, *grids = template.slots
    return isinstance(text, TextSlot) and len(grids) == 1 and grids[0] == template.target


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


def _magnify_slots(slots: list[Slot], target: Slot) -> tuple[str, str] | None:
    """Names of the text slot and the small grid of super-resolution; None for any other layout."""
    texts = [slot.name for slot in slots if isinstance(slot, TextSlot)]
    grids = [slot for slot in slots if isinstance(slot, CodeSlot) and slot != target]
    if len(texts) != 1 or len(grids) != 1 or not isinstance(target, CodeSlot):
        return None
    y, x = grids[0].grid
    return (texts[0], grids[0].name) if (2 * y, 2 * x) == target.grid else None
