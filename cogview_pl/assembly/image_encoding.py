"""Encodes captioned images as rows of a token store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from cogview_pl.checkpoints.model_folder import ImageTokenizer
from cogview_pl.data.bad_samples import ImageBatch, collate_images
from cogview_pl.data.config import DataConfig
from cogview_pl.data.loader import Loader, suitable_workers
from cogview_pl.data.samples import CaptionedImages, Skipped
from cogview_pl.data.sharing import Team, batches_of
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.lit.bars import Bar
from cogview_pl.vocab import TextTokenizer


class Encoded(NamedTuple):
    """A batch of samples as rows of the store, and the samples that were skipped."""

    text_tokens: dict[str, list[list[int]]]
    codes: Tensor
    others: dict[str, Tensor]
    large: Tensor | None
    keys: list[str]
    skipped: list[Skipped]
    remarks: Mapping[str, str]

    @property
    def seen(self) -> int:
        """Number of samples that were read."""
        return len(self.keys) + len(self.skipped)


@dataclass(frozen=True)
class ImageEncoder:
    """Reads and encodes images; the processes of a team take turns."""

    data: DataConfig
    images: ImageTokenizer
    text: TextTokenizer
    fields: Sequence[str]
    """Names of the texts of a sample."""
    image_fields: Sequence[str]
    """Names of the further images of a sample."""
    large: bool
    """Whether images are encoded at twice the size too."""
    device: str
    """Device of the image tokenizer."""
    team: Team
    """The processes that take turns."""
    processes: int
    """Number of processes of the run, which share the cores of the machine."""
    look: Callable[[], None] = SIGNALS.check
    """Called between batches; raises when the run is to end."""

    def encoded(self, name: str, source: CaptionedImages, span: range, start: int) -> Iterator[Encoded]:
        """Samples of a data set in batches and in order, in the first process; nothing in the others.

        Args:
            name: of the progress bar.
            source: a split of the data set.
            span: the samples.
            start: number of them that are done.
        """
        batches = batches_of(span[start:], self.data.batch_size)
        loader: Loader[ImageBatch] = Loader(
            source,
            batch_sampler=self.team.own(batches),
            num_workers=suitable_workers(self.data.num_workers, len(span), self.processes),
            collate_fn=collate_images,
            patience=self.data.worker_timeout,
            look=self.look,
        )
        self.images.model.to(self.device).to(memory_format=torch.channels_last)
        read = iter(loader) if len(batches) > self.team.rank else iter(())
        with Bar(name, len(span), "images", done=start) as bar:
            for found in self.team.in_order(lambda _: self._encode(next(read)), batches):
                yield found
                bar.update(found.seen)

    def _encode(self, batch: ImageBatch) -> Encoded:
        self.look()
        size = self.images.settings["image_size"]
        images = batch.images.to(self.device)
        return Encoded(
            {field: [self.text.encode(one) for one in batch.texts_of(field)] for field in self.fields},
            _codes(self.images, images, size),
            {name: _codes(self.images, batch.images_of(name).to(self.device), size) for name in self.image_fields},
            _codes(self.images, images, 2 * size) if self.large else None,
            batch.keys,
            batch.skipped,
            batch.remarks,
        )


def _codes(tokenizer: ImageTokenizer, images: Tensor, edge: int) -> Tensor:
    """Codes, on the CPU, of images `(B, 3, Y, X)` resized to an edge."""
    if not len(images):
        grid = edge // tokenizer.model.downsampling
        return torch.empty(0, grid, grid, dtype=torch.long)
    images = resize(images, [edge, edge], InterpolationMode.BICUBIC, antialias=True)
    return tokenizer.model.encode(images.float() / 255).cpu()
