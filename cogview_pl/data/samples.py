"""What a map or stream of images hands on: a sample, or the reason why there is none."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ImageSample(NamedTuple):
    """One picture and its caption.

    `key` names the sample within its data set; `image` is uint8 `(3, Y, X)`, 0 black … 255 white.
    """

    key: str
    image: torch.Tensor
    text: str


class Skipped(NamedTuple):
    """A sample that could not be used: its key and, in one line, why."""

    key: str
    reason: str
