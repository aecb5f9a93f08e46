"""What a layout is for: the slots that captions and super-resolution need, or a sentence that says they are missing."""

from __future__ import annotations

from cogview_pl.errors import UserError
from cogview_pl.vocab.template import CodeSlot, Template, TextSlot


def is_text_to_image(template: Template) -> bool:
    """Whether a layout is a text, then one image: what pretraining and style finetuning have."""
    text, *grids = template.slots
    return isinstance(text, TextSlot) and len(grids) == 1 and grids[0] == template.target


def caption_slots(template: Template) -> tuple[str, str]:
    """Names of the text slot and the image slot of a captioner; raises UserError for any other layout."""
    grids = [slot.name for slot in template.slots if isinstance(slot, CodeSlot)]
    if not isinstance(template.target, TextSlot) or len(grids) != 1:
        raise UserError(
            f"this model's layout, {template.layout}, does not write text about a image; give a run of task=caption"
        )
    return template.target.name, grids[0]


def magnify_slots(template: Template) -> tuple[str, str]:
    """Names of the text slot and of the small grid; raises UserError for a layout that is not super-resolution."""
    texts = [slot.name for slot in template.slots if isinstance(slot, TextSlot)]
    grids = [slot for slot in template.slots if isinstance(slot, CodeSlot) and slot != template.target]
    target = template.target
    if (
        not (len(texts) == len(grids) == 1 and isinstance(target, CodeSlot))
        or (2 * grids[0].grid[0], 2 * grids[0].grid[1]) != target.grid
    ):
        raise UserError(
            f"this model's layout, {template.layout}, is not one of super-resolution (a grid, then one of twice its "
            "edge); give a run of task=super_resolution"
        )
    return texts[0], grids[0].name
