"""Parquet files with images and captions as a data set with random access by row. Needs the extra `hf`.

A Parquet file is compressed in row groups, so a sample costs the reading of its row group; the last ones are kept.
Reading in order (`task=tokenize`) reads each once.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cogview_pl.data.columns import Column, ColumnDataset
from cogview_pl.data.config import Captions, Decoding
from cogview_pl.data.decoding.decode import SampleError
from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.images import split_indices
from cogview_pl.data.progress import NewProgress, Silent
from cogview_pl.data.shards.files import expand_urls, files_of_split
from cogview_pl.durable.read import UnreadableError, cannot_be_read, require_file
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.vocab.roles import CAPTION

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    pa = pq = None  # type: ignore[assignment]

_KEPT = 2**28
"""Largest number of bytes of row groups that a process keeps, besides the last one."""
_LARGE_GROUP = 2**26
"""Bytes of the images of a row group from which reading in random order is slow."""
_LARGEST_GROUP = 2**31
"""Bytes of the images of a row group that is read at all."""


class ParquetDataset(ColumnDataset):
    """The rows of Parquet files. The key of a sample is `FILE:ROW`, rows counted from 0.

    Args:
        urls: local files, one or several; braces (`{000..003}`) and `*` are expanded.
        split: `train` or `val`.
        image_size: edge of the square images.
        val_fraction: share of `val`, 0 … 1, by a hash of the key (`split_indices`); unused with `val_urls`.
        val_urls: files of `val`; `train` then has all rows of `urls`.
        image_field, caption_field, style_field: columns, see `ColumnDataset`. Paths are relative to their file.
        style_patterns, min_size, text_fields, decoding, captions, caption_seed: see `ImageFileDataset`.
        progress: shows how many files have been indexed.

    Raises:
        UserError: a pattern matches nothing or is remote, a file is damaged or lacks a column, or its row groups are
            too large; see also `ColumnDataset`.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        split: str,
        image_size: int,
        val_fraction: float,
        val_urls: str | Sequence[str] | None = None,
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
        if pq is None:
            raise UserError('data=parquet needs pyarrow; pip install "cogview_pl[hf]"')
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
        self._chosen_by = (split, val_fraction if val_urls is None else None)
        self.files, self._url_key = expand_urls(urls, "data.urls", "parquet"), "data.urls"
        if val_urls is not None:
            val_files = expand_urls(val_urls, "data.val_urls", "parquet")
            self.files, self._url_key = files_of_split(self.files, val_files, split)
        self._names = _names(self.files)
        self._read_footers(progress)
        self._groups = _RowGroups(self.files)
        rows = range(self._starts[-1])
        self._choose_rows(rows if val_urls is not None else split_indices(self._all_keys(), split, val_fraction))

    def key(self, index: int) -> str:
        return self._key(int(self._rows[index]))

    def notes(self) -> list[str]:
        found = [f"{self._url_key}: {self._columns_note()}"]
        if self._largest_group > _LARGE_GROUP:
            found.append(
                f"{self._url_key}: row groups have up to {self._largest_group / 2**20:,.0f} MiB of images, and reading "
                "in random order (task=vqvae) reads a whole one for each image; data=hf keeps a copy with quick access"
            )
        return found

    def fingerprint(self) -> str:
        found = Fingerprint("parquet")
        found.add(*self._settings(), self.image_field, self.caption_field, self.style_field, *self._chosen_by)
        for file, name in zip(self.files, self._names, strict=True):
            found.add_file(file, name)
        return found.hexdigest()

    def _read_footers(self, progress: NewProgress) -> None:
        """Places of all row groups: file, number within it, and first row, counted over all files."""
        groups: list[tuple[int, int]] = []
        starts = [0]
        first_rows = [0]
        self._largest_group = 0
        with progress("index files", len(self.files), "files") as done:
            for number, file in enumerate(self.files):
                SIGNALS.check()
                with _open_named(file, self._url_key) as parquet:
                    columns = self._choose_columns(_columns(parquet.schema_arrow), str(file))
                    for group in range(parquet.metadata.num_row_groups):
                        self._require_small(parquet.metadata.row_group(group), file, columns[0])
                        groups.append((number, group))
                        starts.append(starts[-1] + parquet.metadata.row_group(group).num_rows)
                first_rows.append(starts[-1])
                done.update()
        if not starts[-1]:
            raise UserError(f"{self._url_key}: no rows in {self.files[0]} … ({len(self.files)} files in all)")
        self._places, self._starts, self._first_rows = groups, starts, first_rows

    def _require_small(self, group: pq.RowGroupMetaData, file: Path, column: str) -> None:
        chunks = [group.column(number) for number in range(group.num_columns)]
        size = sum(one.total_uncompressed_size for one in chunks if one.path_in_schema.split(".")[0] == column)
        self._largest_group = max(self._largest_group, size)
        if size > _LARGEST_GROUP:
            raise UserError(
                f"{file}: a row group has {size / 2**30:.1f} GiB of images, at most {_LARGEST_GROUP // 2**30} are read "
                "at once; write groups of about 100 rows, or use data=hf, which keeps a copy with quick access"
            )

    def _all_keys(self) -> Iterator[str]:
        for name, first, end in zip(self._names, self._first_rows, self._first_rows[1:], strict=False):
            yield from (f"{name}:{row}" for row in range(end - first))

    def _key(self, row: int) -> str:
        file = bisect_right(self._first_rows, row) - 1
        return f"{self._names[file]}:{row - self._first_rows[file]}"

    def _cell(self, index: int, column: str) -> Any:
        row = int(self._rows[index])
        place = bisect_right(self._starts, row) - 1
        file, group = self._places[place]
        return self._groups.read(file, group, column)[row - self._starts[place]].as_py()

    def _folder(self, index: int) -> Path:
        return self.files[bisect_right(self._first_rows, int(self._rows[index])) - 1].parent


class _RowGroups:
    """Columns of row groups; the last ones are kept.

    A forked or pickled copy in another process starts empty, because a shared file would share its position.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._kept: OrderedDict[tuple[int, int, str], pa.ChunkedArray] = OrderedDict()
        self._open: dict[int, pq.ParquetFile] = {}

    def __reduce__(self) -> tuple[type[_RowGroups], tuple[Sequence[Path]]]:
        return _RowGroups, (self._files,)

    def read(self, file: int, group: int, column: str) -> pa.ChunkedArray:
        """A column of a row group; raises SampleError if it cannot be read."""
        if self._process != os.getpid():
            self._forget()
        place = (file, group, column)
        if place not in self._kept:
            self._kept[place] = self._read(file, group, column)
            while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(place)
        return self._kept[place]

    def _read(self, file: int, group: int, column: str) -> pa.ChunkedArray:
        path = self._files[file]
        try:
            if file not in self._open:
                require_file(path)
                self._open = {file: pq.ParquetFile(path)}
            # Threads of pyarrow do not survive a fork.
            return self._open[file].read_row_group(group, columns=[column], use_threads=False).column(0)
        except UnreadableError as error:
            raise SampleError(f"{path} {error}") from None
        except (pa.ArrowException, OSError) as error:
            raise SampleError(f"{path} cannot be read ({' '.join(str(error).split())[:200]})") from None


def _open_named(file: Path, key: str) -> pq.ParquetFile:
    try:
        require_file(file)
        return pq.ParquetFile(file)
    except UnreadableError as error:
        raise UserError(f"{file} {error}; give a Parquet file, or leave it out of {key}") from None
    except (pa.ArrowException, OSError) as error:
        reason = cannot_be_read(error) if isinstance(error, OSError) and error.errno else "is no whole Parquet file"
        raise UserError(f"{file} {reason}; fetch it again, or leave it out of {key}") from None


def _columns(schema: pa.Schema) -> dict[str, Column]:
    return {field.name: _kind(field.type) for field in schema}


def _kind(of: pa.DataType) -> Column:
    if pa.types.is_struct(of):
        names = {of.field(number).name for number in range(of.num_fields)}
        return Column.image if names & {"bytes", "path"} else Column.other
    if pa.types.is_binary(of) or pa.types.is_large_binary(of):
        return Column.bytes
    if pa.types.is_list(of) or pa.types.is_large_list(of) or pa.types.is_dictionary(of):
        inner = _kind(of.value_type)
        return Column.text if inner == Column.text else Column.other
    return Column.text if pa.types.is_string(of) or pa.types.is_large_string(of) else Column.other


def _names(files: Sequence[Path]) -> list[str]:
    """Short names of files: their last part, or what follows their common folder where that is not unique."""
    last = [file.name for file in files]
    if len(set(last)) == len(last):
        return last
    common = os.path.commonpath([os.path.abspath(file) for file in files])
    return [Path(os.path.relpath(os.path.abspath(file), common)).as_posix() for file in files]
