"""What a map or stream of images hands on: a sample, or the reason why there is none."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch


class ImageSample(NamedTuple):
    """One image and its caption.

    `key` names the sample within its data set; `image` is uint8 `(3, Y, X)`, 0 black … 255 white.
    """

    key: str
    image: torch.Tensor
    text: str


class Skipped(NamedTuple):
    """A sample that could not be used: its key and, in one line, why."""

    key: str
    reason: str


def fraction_of(key: str) -> float:
    """A number in [0, 1) that is fixed by the key alone: for choices that must not depend on other samples."""
    digest = hashlib.sha1(key.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
