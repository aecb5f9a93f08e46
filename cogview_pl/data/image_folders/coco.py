"""COCO's annotation files of captions: `images` and `annotations` in one JSON object."""

from __future__ import annotations

from pathlib import Path

from cogview_pl.data.image_folders.listed import Fields
from cogview_pl.errors import UserError


def is_coco(tree: object) -> bool:
    """Whether a JSON tree has the two lists of an annotation file."""
    return isinstance(tree, dict) and all(isinstance(tree.get(name), list) for name in ("images", "annotations"))


def coco_records(tree: dict[str, list[object]], file: Path, fields: Fields) -> list[dict[str, object]]:
    """One record per image, with the captions of all its annotations in their order.

    Args:
        tree: see `is_coco`.
        file: its name, for messages.
        fields: give the names of the fields of the records.

    Raises:
        UserError: no annotation has a caption, though captions are needed.
    """
    captions: dict[object, list[object]] = {}
    for one in tree["annotations"]:
        if isinstance(one, dict) and "caption" in one and isinstance(one.get("image_id"), (int, str)):
            captions.setdefault(one["image_id"], []).append(one["caption"])
    if not captions and fields.texts:
        raise UserError(f"{file}: its annotations have no captions; give the file with captions, captions_*.json")
    records = []
    for image in tree["images"]:
        known = image if isinstance(image, dict) else {}
        number = known.get("id")
        texts = captions.get(number, []) if isinstance(number, (int, str)) else []
        records.append({fields.files[0]: known.get("file_name"), fields.captions[0]: texts})
    return records
