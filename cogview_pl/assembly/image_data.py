"""Opens the captioned images that `data=…` describes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cache
from typing import Any

from hydra.utils import get_class

from cogview_pl.data.bad_samples import require_readable
from cogview_pl.data.config import DataConfig, Decoding, FolderDataConfig, ImageFilesConfig
from cogview_pl.data.folder import folders
from cogview_pl.data.image_folders.layout import require_folder
from cogview_pl.data.images import ImageFileDataset
from cogview_pl.data.pairs import SOURCE, PairedImages
from cogview_pl.data.samples import CaptionedImages
from cogview_pl.data.views import Views
from cogview_pl.errors import UserError
from cogview_pl.lit.bars import Bar, status
from cogview_pl.toy_world.dataset import ToyDataset
from cogview_pl.vocab.roles import CAPTION

_log = logging.getLogger(__name__)


def check_folders(data: DataConfig) -> None:
    """Raises UserError if a folder of `data=folder` is missing; nothing in it is read."""
    if isinstance(data, FolderDataConfig):
        for style, folder in folders(data.root, data.styles, data.listing).items():
            require_folder(folder, f"data.styles.{style}" if style else "data.root")


def open_images(
    data: DataConfig, split: str, text_fields: Sequence[str] = (CAPTION,), image_fields: Sequence[str] = ()
) -> CaptionedImages:
    """The `train` or `val` split of a data set.

    Args:
        data: class of the data set and its arguments.
        split: `train` or `val`.
        text_fields: names of the texts that samples must have; `text` is the caption. None of them: images alone,
            so that a data set may lack captions.
        image_fields: names of the further images that samples must have. Image files become pairs for `source`.

    Raises:
        UserError: the class cannot be used, no sample can be read, samples lack a text or an image, there are no pairs,
            or there are several views that would be the same.
    """
    kind = _class_of(data)
    if image_fields and issubclass(kind, ImageFileDataset):
        images: CaptionedImages = _open_pairs(data, split, image_fields)
    else:
        images = _open(kind, data, split, text_fields, image_fields)
    for note in images.notes():
        _say(note)
    if split == "train":
        sample = require_readable(images)
        for field in text_fields:
            sample.text_of(field)
        for field in image_fields:
            sample.image_of(field)
        if isinstance(images, ImageFileDataset) and images.decoding.views > 1:
            return Views(images, images.decoding.views)
    return images


def _open_pairs(data: DataConfig, split: str, image_fields: Sequence[str]) -> PairedImages:
    """Pairs of image files in two styles. A pair is in one split: that of the files, or by what its images share."""
    if tuple(image_fields) != (SOURCE,):
        raise UserError(
            f"template.layout: pairs of images have one further image, {SOURCE}, the layout has "
            f"{', '.join(image_fields)}; name the slot {{{SOURCE}:…}}"
        )
    assert isinstance(data, ImageFilesConfig)
    if data.random:
        raise UserError(
            "data.crop=random, data.flip and data.zoom would cut the images of a pair differently; drop them"
        )
    style_field, patterns, of_files = data.style_field, data.style_patterns, copy(data)
    of_files.style_patterns = []
    fields = tuple(dict.fromkeys(field for field in (data.pair_field, style_field) if field is not None))
    if any(getattr(data, key, None) is not None for key in ("val_urls", "val_split")):
        images = _open(_class_of(data), of_files, split, fields)
        assert isinstance(images, ImageFileDataset)
        return PairedImages(images, data.pair_field, style_field, patterns)
    of_files.val_fraction = 0.0
    images = _open(_class_of(data), of_files, "train", fields)
    assert isinstance(images, ImageFileDataset)
    return PairedImages(images, data.pair_field, style_field, patterns, split, data.val_fraction)


def _open(
    kind: type[CaptionedImages],
    data: DataConfig,
    split: str,
    text_fields: Sequence[str],
    image_fields: Sequence[str] = (),
) -> CaptionedImages:
    """Make a data set of a class; see `open_images`."""
    arguments: dict[str, Any] = {"split": split, **data.arguments()}
    decoding = arguments.get("decoding")
    if isinstance(decoding, Decoding) and decoding.views > 1 and not decoding.random:
        raise UserError(f"data.views={decoding.views}: all would be the same; set data.crop=random or data.flip=true")
    if isinstance(decoding, Decoding) and split != "train":
        arguments["decoding"] = decoding.of_validation()
    takes = inspect.signature(kind)
    if "text_fields" in takes.parameters:
        arguments["text_fields"] = tuple(text_fields)
    if "image_fields" in takes.parameters:
        arguments["image_fields"] = tuple(image_fields)
    if "progress" in takes.parameters:
        arguments["progress"] = Bar
    try:
        takes.bind(**arguments)
    except TypeError as error:
        raise UserError(f"data._target_={data._target_} cannot be made: {error}; mend its keys under data") from None
    status("indexing images …")
    return kind(**arguments)


@cache
def _say(note: str) -> None:
    """Log a note on a data set once: the splits of a data set, and the stages of a chain, have the same."""
    _log.info("%s", note)


def is_toy_world(data: DataConfig) -> bool:
    """Whether images come from the toy world, where a judge can check captions."""
    return issubclass(_class_of(data), ToyDataset)


def validation_images(
    data: DataConfig, text_fields: Sequence[str] = (CAPTION,), image_fields: Sequence[str] = ()
) -> CaptionedImages:
    """The validation split; raises UserError if it is empty."""
    images = open_images(data, "val", text_fields, image_fields)
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
