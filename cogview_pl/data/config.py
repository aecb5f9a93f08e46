"""Options of data sets, token stores and training sequences: `conf/data`, `token_store` and `sequences`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from cogview_pl.limits import MISSING, above_0, at_least_0, count, share, share_below_1


class StoreFormat(Enum):
    """Rows of a token store on disk."""

    native = "native"
    cogview = "cogview"


class TokenSource(Enum):
    """Where stage 2 finds its tokens when no store is named."""

    tokenize = "tokenize"
    images = "images"


@dataclass
class DataConfig:
    """What every data source has; the variants extend it."""

    kind: str = MISSING
    image_size: int = count()
    batch_size: int = count()
    num_workers: int = at_least_0()
    worker_timeout: float | None = above_0()
    max_skipped_share: float = share()
    val_fraction: float = share()
    min_size: int = at_least_0(0)
    style_patterns: list[str] = MISSING
    token_store: str | None = None


@dataclass
class FolderDataConfig(DataConfig):
    """A folder of images with captions."""

    root: str | None = None
    caption_field: str | None = None
    styles: Any = None
    style_field: str | None = None


@dataclass
class WebDatasetConfig(DataConfig):
    """Tar shards."""

    urls: Any = MISSING
    val_urls: Any = None
    caption_field: str = MISSING
    style_field: str | None = None
    styles: list[str] | None = None


@dataclass
class TokenStoreConfig:
    """The token store that task=tokenize writes."""

    format: StoreFormat = MISSING
    large: bool = MISSING


@dataclass
class SequencesConfig:
    """What stage 2 trains on."""

    source: TokenSource = MISSING
    replay_store: str | None = None
    replay_share: float = share_below_1()
    conditioning_dropout: float = share_below_1()
    token_noise: float = share_below_1()
