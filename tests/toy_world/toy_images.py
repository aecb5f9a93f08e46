"""A split of the toy world with the options of `conf/data/toy.yaml`."""

from __future__ import annotations

from typing import Any

from cogview_pl.toy_world.dataset import ToyDataset


def toy_images(split: str, size: int, *, image_size: int = 64, **options: Any) -> ToyDataset:
    """`size` images of `split`; `options` replace those of the file."""
    return ToyDataset(split, image_size, train_size=size, val_size=size, **options)
