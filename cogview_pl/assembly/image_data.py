"""Opens the captioned images that `data=…` describes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from hydra.utils import get_class

from cogview_pl.data.bad_samples import require_readable
from cogview_pl.data.config import DataConfig, Decoding
from cogview_pl.data.images import ImageFileDataset
from cogview_pl.data.samples import CaptionedImages
from cogview_pl.data.views import Views
from cogview_pl.errors import UserError
from cogview_pl.lit.bars import Bar, status
from cogview_pl.toy_world.dataset import ToyDataset
from cogview_pl.vocab.roles import CAPTION

_log = logging.getLogger(__name__)


def open_images(data: DataConfig, split: str, text_fields: Sequence[str] = (CAPTION,)) -> CaptionedImages:
    """The `train` or `val` split of a data set.

    Args:
        data: class of the data set and its arguments.
        split: `train` or `val`.
        text_fields: names of the texts that samples must have; `text` is the caption. None of them: images alone,
            so that a data set may lack captions.

    Raises:
        UserError: the class cannot be used, no sample can be read, samples lack a text, or there are several views
            that would be the same.
    """
    arguments: dict[str, Any] = {"split": split, **data.arguments()}
    decoding = arguments.get("decoding")
    if isinstance(decoding, Decoding) and decoding.views > 1 and not decoding.random:
        raise UserError(f"data.views={decoding.views}: all would be the same; set data.crop=random or data.flip=true")
    if isinstance(decoding, Decoding) and split != "train":
        arguments["decoding"] = decoding.of_validation()
    kind = _class_of(data)
    takes = inspect.signature(kind)
    if "text_fields" in takes.parameters:
        arguments["text_fields"] = tuple(text_fields)
    if "progress" in takes.parameters:
        arguments["progress"] = Bar
    try:
        takes.bind(**arguments)
    except TypeError as error:
        raise UserError(f"data._target_={data._target_} cannot be made: {error}; mend its keys under data") from None
    status("indexing images …")
    images = kind(**arguments)
    for note in images.notes():
        _say(note)
    if split == "train":
        sample = require_readable(images)
        for field in text_fields:
            sample.text_of(field)
        if isinstance(images, ImageFileDataset) and images.decoding.views > 1:
            return Views(images, images.decoding.views)
    return images


@cache
def _say(note: str) -> None:
    """Log a note on a data set once: the splits of a data set, and the stages of a chain, have the same."""
    _log.info("%s", note)


def is_toy_world(data: DataConfig) -> bool:
    """Whether images come from the toy world, where a judge can check captions."""
    return issubclass(_class_of(data), ToyDataset)


def validation_images(data: DataConfig, text_fields: Sequence[str] = (CAPTION,)) -> CaptionedImages:
    """The validation split; raises UserError if it is empty."""
    images = open_images(data, "val", text_fields)
    if not len(images):
        keys = [f"data.{name}" for name in ("val_fraction", "val_urls") if hasattr(data, name)]
        more = f"set {' or '.join(keys)}" if keys else "add validation samples"
        raise UserError(f"data: the validation split has no images; {more}, or give the images or prompts of this task")
    return images


def image_inputs(splits: Mapping[str, CaptionedImages]) -> dict[str, str]:
    """Fingerprints of the splits of a data set; a resumed run compares them."""
    return {f"data ({name} split)": images.fingerprint() for name, images in splits.items()}


def _class_of(data: DataConfig) -> type[CaptionedImages]:
    """Class of a data set; raises UserError if it cannot be imported or is no `CaptionedImages`."""
    key = f"data._target_={data._target_}"
    try:
        found = get_class(data._target_)
    except Exception as error:  # a module of the user's may raise anything on import
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{key} cannot be imported: {reason}; name a class as FILE.CLASS") from error
    if not issubclass(found, CaptionedImages):
        raise UserError(f"{key} is no data set; derive it from cogview_pl.data.samples.CaptionedImages")
    return found
