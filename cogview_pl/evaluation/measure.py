"""Passes over reference images and generated images: each image is read once, and every metric takes it in.

Images are streamed, so memory does not limit their number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from tqdm import tqdm

from cogview_pl.data.bad_samples import BadSampleLog, ImageBatch, collate_images
from cogview_pl.data.loader import Loader
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.evaluation.features import FeatureNetwork, Features
from cogview_pl.evaluation.image_files import blur
from cogview_pl.evaluation.metrics import FID, ReconstructionMetrics
from cogview_pl.toy_world.accuracy import AttributeAccuracy, StyleAccuracy


class Images(Protocol):
    """A map-style data set of images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageSample | Skipped: ...


@dataclass(frozen=True)
class Reader:
    """Reads images in batches, and lists unreadable ones in `bad_samples`."""

    batch_size: int
    num_workers: int
    worker_timeout: float | None
    """Seconds to wait for a loader process that finishes no sample; None: no limit."""
    bad_samples: BadSampleLog

    def batches(self, source: Images, name: str) -> Iterator[ImageBatch]:
        """All readable images in order; the progress bar shows `name`."""
        loader: Loader[ImageBatch] = Loader(
            source,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate_images,
            patience=self.worker_timeout,
            look=SIGNALS.check,
        )
        with tqdm(total=len(source), unit="image", desc=name, disable=None) as progress:
            for batch in loader:
                SIGNALS.check()
                count = len(batch.images) + len(batch.skipped)
                self.bad_samples.add(batch.skipped, count)
                if len(batch.images):
                    yield batch
                progress.update(count)


@dataclass
class Reference:
    """Number and hash of the real images."""

    count: int = 0
    sha256: str = ""
    """Hash of the pixels of all images, in order."""


@dataclass
class Generated:
    """Prompts and logits of the generated images."""

    prompts: list[str] = field(default_factory=list)
    """One per image."""
    logits: list[Tensor] = field(default_factory=list)
    """Logits of the feature network, `(B, K)` per batch."""


def measure_reference(
    images: Images,
    reader: Reader,
    *,
    network: FeatureNetwork,
    fids: Mapping[float, FID],
    reconstruction: ReconstructionMetrics | None,
    rfid: FID,
) -> Reference:
    """Give the real images to the FID of each blur radius, and their reconstructions to `rfid`."""
    seen = Reference()
    digest = hashlib.sha256()
    for batch in reader.batches(images, "reference"):
        digest.update(batch.images.numpy().tobytes())
        batch_B3YX = batch.images.float() / 255
        found = _look(network, batch_B3YX, fids)
        for radius, fid in fids.items():
            fid.add_real(found[radius].features)
        if reconstruction is not None:
            rfid.add_real(found[0].features)
            rfid.add_generated(network(reconstruction.add(batch_B3YX)).features)
        seen.count += len(batch_B3YX)
    seen.sha256 = digest.hexdigest()
    return seen


def measure_generated(
    images: Images,
    reader: Reader,
    *,
    network: FeatureNetwork | None,
    fids: Mapping[float, FID],
    attributes: AttributeAccuracy | None,
    style: StyleAccuracy | None,
) -> Generated:
    """Give the generated images to the FID of each blur radius and to the judges of the toy world."""
    seen = Generated()
    for batch in reader.batches(images, "generated"):
        batch_B3YX = batch.images.float() / 255
        if network is not None:
            found = _look(network, batch_B3YX, fids)
            for radius, fid in fids.items():
                fid.add_generated(found[radius].features)
            logits = found[0].logits
            if logits is not None:
                seen.logits.append(logits)
                if style is not None:
                    style.add(logits, batch.texts)
        if attributes is not None:
            attributes.add(batch.images, batch.texts)
        seen.prompts += batch.texts
    return seen


def _look(network: FeatureNetwork, batch_B3YX: Tensor, radii: Iterable[float]) -> dict[float, Features]:
    """Features of the images at each blur radius, and without blur."""
    return {radius: network(blur(batch_B3YX, radius)) for radius in {0.0, *radii}}
