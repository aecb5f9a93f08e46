"""Passes over reference and generated images: each image is read once, for all metrics.

Images are streamed, so memory does not limit their number. The processes of a team take turns with the batches; sums
are formed in the first one, in order, so they do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from cogview_pl.data.bad_samples import BadSampleLog, ImageBatch, collate_images
from cogview_pl.data.loader import Loader, suitable_workers
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.data.sharing import Team, batches_of
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.evaluation.features import FeatureNetwork, Features
from cogview_pl.evaluation.image_files import blur
from cogview_pl.lit.bars import Bar

R = TypeVar("R")


class Images(Protocol):
    """A map-style data set of images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageSample | Skipped: ...


@dataclass(frozen=True)
class Reader:
    """Reads images in batches; those that cannot be read are listed."""

    batch_size: int
    num_workers: int | None
    worker_timeout: float | None
    """Seconds without a finished sample after which waiting for loader processes ends; None: no limit."""
    skips: BadSampleLog | None
    """None in all processes but the first."""
    team: Team

    def each(self, source: Images, name: str, look: Callable[[ImageBatch], R]) -> Iterator[R]:
        """What `look` finds in each batch of readable images, in order, under a progress bar with a name.

        In all processes but the first it yields nothing, and computes for the first one.
        """
        size = len(source)
        batches = batches_of(range(size), self.batch_size)
        loader: Loader[ImageBatch] = Loader(
            source,  # type: ignore[arg-type]
            batch_sampler=self.team.own(batches),
            num_workers=suitable_workers(self.num_workers, size, self.team.size),
            collate_fn=collate_images,
            patience=self.worker_timeout,
            look=SIGNALS.check,
        )
        read = iter(loader) if len(batches) > self.team.rank else iter(())

        def look_at_next(_: range) -> tuple[list[Skipped], int, R | None]:
            SIGNALS.check()
            batch = next(read)
            return batch.skipped, len(batch.images), look(batch) if len(batch.images) else None

        with Bar(name, size, "images") as bar:
            for skipped, readable, found in self.team.in_order(look_at_next, batches):
                assert self.skips is not None
                self.skips.add(skipped, readable + len(skipped))
                if found is not None:
                    yield found
                bar.update(readable + len(skipped))


class View(NamedTuple):
    """A batch of images as the metrics see it; B images."""

    images: Tensor
    """uint8 `(B, 3, Y, X)`."""
    prompts: list[str]
    features: dict[float, Features]
    """By blur radius, 0 always among them; empty without a feature network."""


def view(batch: ImageBatch, network: FeatureNetwork | None, radii: Iterable[float]) -> View:
    """Look at a batch through the feature network at each blur radius."""
    features = {}
    if network is not None:
        pixels_B3YX = batch.images.float() / 255
        features = {radius: network(blur(pixels_B3YX, radius)) for radius in {0.0, *radii}}
    return View(batch.images, batch.texts, features)
