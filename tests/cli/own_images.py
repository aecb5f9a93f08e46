"""A data set whose process meets a misfortune at one sample, for tests of several processes."""

from __future__ import annotations

import os
import signal

from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.errors import UserError
from cogview_pl.toy_world.dataset import ToyDataset

AT = 12  # with batches of 8, a sample of the second process


class Misfortune(ToyDataset):
    """The toy world, until sample 12 is read by a process that is not the first; `KIND` says what happens then."""

    def __getitem__(self, index: int) -> ImageSample | Skipped:
        if index == AT and os.environ.get("LOCAL_RANK", "0") != "0":
            kind = os.environ["KIND"]
            if kind == "error":
                raise UserError("data.root: sample 12 lies on a disk of the second machine")
            if kind == "defect":
                raise ZeroDivisionError("a mistake")
            os.kill(os.getpid(), signal.Signals[kind])
        return super().__getitem__(index)
