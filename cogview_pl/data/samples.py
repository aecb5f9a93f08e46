"""Captioned images as samples, and the base class of data sets that hold them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.errors import UserError
from cogview_pl.vocab.roles import CAPTION

_FINGERPRINT_SAMPLES = 64
_UNUSED_BITS = 11  # of 8 bytes of a digest: a float has 53
_FRACTIONS = 2**53


class ImageSample(NamedTuple):
    """One image and its texts."""

    key: str
    """Names the sample within its data set."""
    image: torch.Tensor
    """uint8 `(3, Y, X)`, 0 black … 255 white."""
    text: str
    """The caption; empty where the layout has no slot `{text}`."""
    fields: Mapping[str, str] = {}
    """Text of each other text slot of the layout, by the slot's name."""
    remark: str = ""
    """What was mended when the image was decoded; empty: nothing."""
    images: Mapping[str, torch.Tensor] = {}
    """Further images of the same shape, by the name of their slot in the layout: the `source` of a pair."""

    def text_of(self, field: str) -> str:
        """The text of a field; `text` is the caption. Raises UserError where the sample lacks the field."""
        if field == CAPTION:
            return self.text
        if field not in self.fields:
            raise UserError(f"data: sample {self.key} has no text {field}, a slot of template.layout")
        return self.fields[field]

    def image_of(self, field: str) -> torch.Tensor:
        """A further image, uint8 `(3, Y, X)`; raises UserError where the sample lacks it."""
        if field not in self.images:
            raise UserError(f"data: sample {self.key} has no image {field}, a slot of template.layout")
        return self.images[field]


class Skipped(NamedTuple):
    """A sample that could not be used, and the reason in one line."""

    key: str
    reason: str


class CaptionedImages(Dataset["ImageSample | Skipped"], ABC):
    """A map-style data set of images with captions: the base class of our data sets and of a user's own.

    `dataset[i]` must be the same sample whenever it is read, so that a run can be resumed.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> ImageSample | Skipped: ...

    def key(self, index: int) -> str:
        """The name of a sample within the data set. This default reads the sample."""
        return self[index].key

    def text(self, index: int, field: str = CAPTION) -> str:
        """The text of one field; empty where the sample is skipped. This default reads the image too."""
        sample = self[index]
        return sample.text_of(field) if isinstance(sample, ImageSample) else ""

    def texts(self) -> list[str]:
        """All captions, in the order of the samples."""
        return [self.text(index) for index in range(len(self))]

    def known_bad(self) -> Iterator[Skipped]:
        """Samples that are known to be unusable without decoding their images, such as those without a caption."""
        return iter(())

    def notes(self) -> list[str]:
        """What a user should know of the data set, such as which files it leaves out: a line for each."""
        return []

    def fingerprint(self) -> str:
        """A digest that changes with the samples; a resumed run compares it with that of its beginning.

        This default reads 64 samples at equal distances. Override it where more may change.
        """
        found = Fingerprint(f"{type(self).__module__}.{type(self).__qualname__}")
        found.add(len(self))
        for index in range(0, len(self), max(1, len(self) // _FINGERPRINT_SAMPLES)):
            sample = self[index]
            if isinstance(sample, Skipped):
                found.add(*sample)
            else:
                found.add(sample.key, sample.text, dict(sample.fields))
                for image in (sample.image, *sample.images.values()):
                    found.add_bytes(image.contiguous().numpy().tobytes())
        return found.hexdigest()


def fraction_of(key: str) -> float:
    """A number in [0, 1) that follows from the key alone, for choices that must not depend on other samples."""
    return (int.from_bytes(_digest(key.encode("utf-8", "surrogatepass")), "big") >> _UNUSED_BITS) / _FRACTIONS


def fractions_of(keys: Iterable[bytes]) -> np.ndarray:
    """`fraction_of` keys in UTF-8, float64."""
    digests = bytearray()
    for key in keys:
        digests += _digest(key)
    return (np.frombuffer(digests, ">u8") >> _UNUSED_BITS) / _FRACTIONS


def _digest(key: bytes) -> bytes:
    return hashlib.sha1(key, usedforsecurity=False).digest()[:8]
