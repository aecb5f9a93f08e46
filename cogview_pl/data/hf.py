"""Data sets of Hugging Face's `datasets` with images and captions. Needs the extra `hf`.

`datasets` keeps a copy of the rows in its cache (`HF_DATASETS_CACHE`), memory-mapped, with quick access to any row.
Its loading scripts are not run: it has supported none since version 4.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cogview_pl.data.columns import Column, ColumnDataset
from cogview_pl.data.config import Captions, Decoding
from cogview_pl.data.decoding.decode import SampleError
from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.images import split_indices
from cogview_pl.data.progress import NewProgress, Silent
from cogview_pl.errors import UserError
from cogview_pl.vocab.roles import CAPTION

try:
    import datasets
except ImportError:
    datasets = None  # type: ignore[assignment]

_REASON = 300  # characters of an error of `datasets` that are shown


class HuggingFaceDataset(ColumnDataset):
    """A split of a data set. The key of a sample is `SPLIT:ROW`, rows counted from 0.

    Args:
        name: a folder that `save_to_disk` wrote, a folder of Parquet files, a folder of images with `metadata.jsonl`
            (`imagefolder`), or the name of a data set on the hub.
        split: `train` or `val`.
        image_size: edge of the square images.
        val_fraction: share of `val`, 0 … 1, by a hash of the key (`split_indices`); unused with `val_split`.
        subset: configuration of a data set on the hub.
        train_split: split of the data set with the training samples; unused where it has no splits.
        val_split: split with the validation samples; None keeps `val_fraction` of `train_split`.
        image_field, caption_field, style_field: columns, see `ColumnDataset`.
        style_patterns, min_size, text_fields, decoding, captions, caption_seed: see `ImageFileDataset`.
        progress: shows that the data set is being opened.

    Raises:
        UserError: it cannot be loaded, or has no such split or column; see also `ColumnDataset`.
    """

    def __init__(
        self,
        name: str,
        split: str,
        image_size: int,
        val_fraction: float,
        subset: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        *,
        image_field: str | None = None,
        caption_field: str | None = None,
        style_field: str | None = None,
        style_patterns: Sequence[str] = (),
        min_size: int = 0,
        text_fields: Sequence[str] = (CAPTION,),
        decoding: Decoding | None = None,
        captions: Captions | str = Captions.first,
        caption_seed: int = 0,
        progress: NewProgress = Silent,
    ) -> None:
        if datasets is None:
            raise UserError('data=hf needs datasets; pip install "cogview_pl[hf]"')
        super().__init__(
            image_size,
            image_field,
            caption_field,
            style_field,
            style_patterns,
            min_size,
            text_fields,
            decoding,
            captions,
            caption_seed,
        )
        self.name = name
        self.subset = subset
        key = "data.train_split" if split == "train" or val_split is None else "data.val_split"
        self.split = val_split if val_split is not None and split == "val" else train_split
        self._chosen_by = (split, val_fraction if val_split is None else None)
        self._local = Path(os.path.expanduser(name))
        with progress(f"open {name}", None, "data sets") as done:
            rows = _open(name, self._local, subset, self.split, key)
            done.update()
        chosen = self._choose_columns({column: _kind(rows.features[column]) for column in rows.column_names}, name)
        if isinstance(rows.features[self._image_column], datasets.Image):
            rows = rows.cast_column(self._image_column, datasets.Image(decode=False))
        if self.style_field is not None and self.style_field in rows.column_names:
            chosen.append(self.style_field)
        self._source = None if self._local.exists() else [str(rows.info.version), *(rows.info.download_checksums or {})]
        # One view per column: otherwise a caption would cost the reading of its image.
        self._columns = {column: rows.select_columns([column]) for column in dict.fromkeys(chosen)}
        keys = (f"{self.split}:{row}" for row in range(len(rows)))
        self._choose_rows(range(len(rows)) if val_split is not None else split_indices(keys, split, val_fraction))

    def key(self, index: int) -> str:
        return f"{self.split}:{self._rows[index]}"

    def notes(self) -> list[str]:
        return [f"data.name={self.name}: {self._columns_note()}"]

    def fingerprint(self) -> str:
        found = Fingerprint("hf")
        found.add(*self._settings(), self.image_field, self.caption_field, self.style_field, *self._chosen_by)
        found.add(self.subset, self.split, len(self), self._source)
        for file in _files(self._local):
            found.add_file(file, file.relative_to(self._local).as_posix())
        return found.hexdigest()

    def _cell(self, index: int, column: str) -> Any:
        try:
            return self._columns[column][int(self._rows[index])][column]
        except (OSError, ValueError) as error:  # pyarrow's errors are among them
            raise SampleError(f"the row cannot be read ({' '.join(str(error).split())[:_REASON]})") from None

    def _folder(self, index: int) -> Path:
        return self._local


def _open(name: str, local: Path, subset: str | None, split: str, key: str) -> datasets.Dataset:
    """The rows of a split; raises UserError if it cannot be loaded."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not local.exists() and (name.startswith(("/", ".", "~")) or not name.strip()):
        raise UserError(f"data.name={name} does not exist; give a folder, or the name of a data set on the hub")
    try:
        found = _load(name, local, subset)
    except Exception as error:  # its errors are of many kinds
        reason = " ".join(str(error.__cause__ or error).split())[:_REASON] or type(error).__name__
        raise UserError(
            f"data.name={name} cannot be loaded: {reason}; give a folder of Parquet files, of images with "
            "metadata.jsonl or one that save_to_disk wrote, or the name of a data set on the hub"
        ) from None
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise UserError(f"{key}={split}: {name} has no such split; set it to one of: {', '.join(found)}")
    return found[split]


def _load(name: str, local: Path, subset: str | None) -> datasets.Dataset | datasets.DatasetDict:
    if local.is_file():
        return datasets.load_dataset("parquet", data_files=[str(local)])
    if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
        return datasets.load_from_disk(str(local))
    return datasets.load_dataset(str(local) if local.exists() else name, subset)


def _kind(feature: Any) -> Column:
    if isinstance(feature, datasets.Image):
        return Column.image
    if isinstance(feature, dict):
        return Column.image if feature.keys() & {"bytes", "path"} else Column.other
    if isinstance(feature, datasets.Value):
        kinds = {
            "string": Column.text,
            "large_string": Column.text,
            "binary": Column.bytes,
            "large_binary": Column.bytes,
        }
        return kinds.get(feature.dtype, Column.other)
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return Column.text if inner is not None and _kind(inner) == Column.text else Column.other


def _files(folder: Path) -> Iterator[Path]:
    """The files of a local data set in a fixed order; none for one of the hub."""
    if folder.is_file():
        yield folder
    for at, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(at, name) for name in sorted(names))
