"""Opens the captioned images that `data=…` describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from cogview_pl.data.bad_samples import require_readable
from cogview_pl.data.config import DataConfig, FolderDataConfig, WebDatasetConfig
from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.data.webdataset import ShardDataset
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.toy_world.config import ToyDataConfig
from cogview_pl.toy_world.dataset import ToyDataset


class CaptionedImages(Protocol):
    """A map-style data set of images with captions."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageSample | Skipped: ...

    def text(self, index: int) -> str:
        """The caption alone, without decoding the image."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes with the samples, without reading the images."""
        ...


def open_images(data: DataConfig, split: str) -> CaptionedImages:
    """The `train` or `val` split of a data source; raises UserError where it cannot be used."""
    images = _open(data, split)
    if split == "train":
        require_readable(images)
    return images


def validation_samples(data: DataConfig, count: int) -> tuple[list[ImageSample], list[Skipped]]:
    """The first `count` samples of the validation split: those that can be read, and the others."""
    source = open_images(data, "val")
    samples = []
    for index in range(min(count, len(source))):
        SIGNALS.check()
        samples.append(source[index])
    good = [sample for sample in samples if isinstance(sample, ImageSample)]
    return good, [sample for sample in samples if isinstance(sample, Skipped)]


def image_inputs(splits: Mapping[str, CaptionedImages]) -> dict[str, str]:
    """Hashes of the splits of a data source, by which a run that goes on knows them again."""
    return {f"data ({name} split)": images.fingerprint() for name, images in splits.items()}


def at_twice_the_size(data: DataConfig) -> DataConfig:
    """The same source, its images with twice the edge; smaller ones have nothing to teach and are skipped."""
    size = 2 * data.image_size
    if isinstance(data, FolderDataConfig | WebDatasetConfig):
        return replace(data, image_size=size, min_size=max(size, data.min_size))
    return replace(data, image_size=size)


def _open(data: DataConfig, split: str) -> CaptionedImages:
    if isinstance(data, ToyDataConfig):
        return ToyDataset(
            split,
            data.train_size if split == "train" else data.val_size,
            seed=data.seed,
            resolution=data.image_size,
            language=data.language,
            styles=data.styles,
            style_patterns=data.style_patterns,
            object_probabilities=data.object_probabilities,
        )
    if isinstance(data, FolderDataConfig):
        return FolderDataset(
            data.root,
            split,
            data.image_size,
            data.val_fraction,
            data.caption_field,
            styles=data.styles,
            style_field=data.style_field,
            style_patterns=data.style_patterns,
            min_size=data.min_size,
        )
    assert isinstance(data, WebDatasetConfig)
    return ShardDataset(
        data.urls,
        image_size=data.image_size,
        caption_field=data.caption_field,
        split=split,
        val_urls=data.val_urls,
        val_fraction=data.val_fraction,
        style_field=data.style_field,
        styles=data.styles,
        style_patterns=data.style_patterns,
        min_size=data.min_size,
    )
