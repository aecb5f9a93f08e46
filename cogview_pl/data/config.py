"""Options of data sets, token stores and training sequences: `conf/data`, `token_store` and `sequences`."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from omegaconf import OmegaConf

from cogview_pl.limits import (
    MISSING,
    ZOOM,
    above_0,
    at_least_0,
    count,
    limited,
    seed_number,
    share,
    share_below_1,
    up_to_256,
    whole,
)

_OF_THE_LOADER = (
    "_target_",
    "batch_size",
    "num_workers",
    "worker_timeout",
    "max_val_samples",
    "max_skipped_share",
    "token_store",
)


class StoreFormat(Enum):
    """Rows of a token store on disk."""

    native = "native"
    cogview = "cogview"


class Captions(Enum):
    """Which of the captions of an image become samples."""

    first = "first"
    random = "random"
    all = "all"


class TokenSource(Enum):
    """Where stage 2 finds its tokens when no store is named."""

    tokenize = "tokenize"
    images = "images"


class Crop(Enum):
    """How an image becomes a square."""

    center = "center"
    random = "random"
    pad = "pad"


@dataclass
class Decoding:
    """How image files are decoded."""

    max_pixels: int = count(default=90_000_000)
    crop: Crop = Crop.center
    zoom: float = limited(ZOOM, 1.0)
    flip: bool = False
    views: int = count(default=1)
    view_seed: int = seed_number(default=0)

    @property
    def random(self) -> bool:
        """Whether views differ."""
        return self.flip or self.crop == Crop.random or self.zoom > 1

    def of_validation(self) -> Decoding:
        """The same without chance: validation images are seen once."""
        crop = Crop.center if self.crop == Crop.random else self.crop
        return replace(self, crop=crop, zoom=1.0, flip=False, views=1)

    def changes(self) -> tuple[str, ...]:
        """The options that change samples: those that differ from the defaults, and the seed where chance counts."""
        usual = vars(Decoding())
        changed = {name for name, value in vars(self).items() if value != usual[name]} - {"view_seed"}
        counting = changed | {"view_seed"} if self.random else changed
        return tuple(f"{name}={value}" for name, value in vars(self).items() if name in counting)


@dataclass
class DataConfig:
    """Options of every data set: its class, and how samples are loaded. Other attributes are arguments of the class."""

    _target_: str = MISSING
    image_size: int = count()
    batch_size: int = count()
    num_workers: int | None = whole()
    worker_timeout: float | None = above_0()
    max_val_samples: int | None = count()
    max_skipped_share: float = share()
    token_store: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the class, without `split` and pairs; the options of decoding are one of them."""
        given = {name: value for name, value in vars(self).items() if name not in _OF_THE_LOADER}
        if isinstance(self, Decoding):
            given.pop("pair_field", None)
            given["decoding"] = Decoding(**{option.name: given.pop(option.name) for option in fields(Decoding)})
        return given

    def at_twice_the_size(self) -> DataConfig:
        """The same images with twice the edge; smaller images have no detail to learn from and are skipped."""
        larger = copy(self)
        larger.image_size = 2 * self.image_size
        if hasattr(larger, "min_size"):
            larger.min_size = max(larger.image_size, larger.min_size)
        return larger

    @staticmethod
    def of_any_class(values: dict[str, Any]) -> DataConfig:
        """Options of a data set that a user brings: typed as far as they are common to all, else as given.

        Raises OmegaConf's errors where a common option has the wrong type.
        """
        common = {field.name for field in fields(DataConfig)}
        typed = OmegaConf.create({"data": DataConfig})
        typed.merge_with({"data": {name: value for name, value in values.items() if name in common}})
        found: DataConfig = OmegaConf.to_object(typed)["data"]  # type: ignore
        vars(found).update({name: value for name, value in values.items() if name not in common})
        return found


@dataclass
class ImageFilesConfig(DataConfig, Decoding):
    """What every data set of image files with captions has (`ImageFileDataset`)."""

    val_fraction: float = share()
    min_size: int = whole()
    captions: Captions = MISSING
    caption_seed: int = MISSING
    style_field: str | None = None
    style_patterns: list[str] = MISSING
    pair_field: str | None = None


@dataclass
class FolderDataConfig(ImageFilesConfig):
    """A folder of images with captions (`FolderDataset`)."""

    root: str | None = None
    listing: str | None = None
    image_field: str | None = None
    caption_field: str | None = None
    styles: Any = None


@dataclass
class WebDatasetConfig(ImageFilesConfig):
    """Tar shards (`ShardDataset`)."""

    urls: Any = MISSING
    val_urls: Any = None
    caption_field: str = MISSING
    styles: list[str] | None = None


@dataclass
class ParquetConfig(ImageFilesConfig):
    """Parquet files (`ParquetDataset`)."""

    urls: Any = MISSING
    val_urls: Any = None
    image_field: str | None = None
    caption_field: str | None = None


@dataclass
class HuggingFaceConfig(ImageFilesConfig):
    """Data sets of Hugging Face's `datasets` (`HuggingFaceDataset`)."""

    name: str = MISSING
    subset: str | None = None
    train_split: str = MISSING
    val_split: str | None = None
    image_field: str | None = None
    caption_field: str | None = None


@dataclass
class TokenStoreConfig:
    """The token store that task=tokenize writes."""

    format: StoreFormat = MISSING
    large: bool = MISSING
    commit_seconds: float = at_least_0()
    parts: int | None = up_to_256(None)  # a reader of the joined store keeps the file of each part open
    part: int | None = up_to_256(None)
    join: Any = None


@dataclass
class SequencesConfig:
    """What stage 2 trains on."""

    source: TokenSource = MISSING
    val_fraction: float = share()
    replay_store: str | None = None
    replay_share: float = share_below_1()
    conditioning_dropout: float = share_below_1()
    token_noise: float = share_below_1()
