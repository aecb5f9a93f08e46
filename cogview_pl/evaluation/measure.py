"""Passes over reference and generated images: each image is read once, for all metrics.

Images are streamed, so memory does not limit their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from cogview_pl.data.bad_samples import BadSampleLog, ImageBatch, collate_images
from cogview_pl.data.loader import Loader
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.evaluation.features import FeatureNetwork, Features
from cogview_pl.evaluation.image_files import blur
from cogview_pl.lit.bars import Bar


class Images(Protocol):
    """A map-style data set of images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageSample | Skipped: ...


@dataclass(frozen=True)
class Reader:
    """Reads images in batches; those that cannot be read are listed."""

    batch_size: int
    num_workers: int
    worker_timeout: float | None
    """Seconds without a finished sample after which waiting for loader processes ends; None: no limit."""
    skips: BadSampleLog

    def batches(self, source: Images, name: str) -> Iterator[ImageBatch]:
        """All readable images in order, under a progress bar with a name."""
        loader: Loader[ImageBatch] = Loader(
            source,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate_images,
            patience=self.worker_timeout,
            look=SIGNALS.check,
        )
        with Bar(name, len(source), "images") as bar:
            for batch in loader:
                SIGNALS.check()
                self.skips.add(batch.skipped, len(batch.images) + len(batch.skipped))
                if len(batch.images):
                    yield batch
                bar.update(len(batch.images) + len(batch.skipped))


class View(NamedTuple):
    """A batch of images as the metrics see it; B images."""

    images: Tensor
    """uint8 `(B, 3, Y, X)`."""
    pixels: Tensor
    """The same as float32 in 0 … 1."""
    prompts: list[str]
    features: dict[float, Features]
    """By blur radius, 0 always among them; empty without a feature network."""


def views(
    images: Images, reader: Reader, name: str, network: FeatureNetwork | None, radii: Iterable[float]
) -> Iterator[View]:
    """Pass once over the images, in order, and look at each batch through the feature network at each blur radius."""
    for batch in reader.batches(images, name):
        pixels_B3YX = batch.images.float() / 255
        features = {r: network(blur(pixels_B3YX, r)) for r in {0.0, *radii}} if network is not None else {}
        yield View(batch.images, pixels_B3YX, batch.texts, features)
