"""The header of a token store, `header.json`, and the names of its other files."""

from __future__ import annotations

import json
import os
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogview_pl.data.token_store.parts import Part
from cogview_pl.data.token_store.rows import RowLayout, require_counts
from cogview_pl.durable.read import UnreadableError, read_file
from cogview_pl.durable.write import write_text
from cogview_pl.errors import UserError
from cogview_pl.vocab.roles import CAPTION

VERSION = 1
HEADER = "header.json"
START_AGAIN = "delete the folder and run task=tokenize again"
_KINDS = {"text_tokenizer": str, "image_tokenizer": str, "complete": bool, "checksums": bool, "large": bool}
_LATER = ("part", "image_fields")
_MOST_BYTES = 2**20  # no header is larger
_PIECE = re.compile(r"\d{4}-of-(\d{4})\.bin")


@dataclass
class SplitHeader:
    """The part of a split that is in the store."""

    source: int
    """Number of samples in the data set."""
    next: int = 0
    """Index of the next sample to tokenise; the samples before it are in the store or were skipped."""
    rows: int = 0
    truncated: int = 0
    """Number of rows with a text that was cut to `text_length`."""
    key_bytes: int = 0
    """Size of `SPLIT.keys.txt`."""
    keys_crc32: int | None = 0
    """Checksum of `SPLIT.keys.txt`; None in stores of earlier versions."""
    sums_crc32: int | None = 0
    """Checksum of `SPLIT.crc32`; None in stores of earlier versions."""

    def __post_init__(self) -> None:
        absent = {name for name in ("keys_crc32", "sums_crc32") if getattr(self, name) is None}
        require_counts({name: value for name, value in vars(self).items() if name not in absent}, least=0)
        if not self.truncated <= self.rows <= self.next <= self.source:
            raise ValueError(f"{self.truncated} cut, {self.rows} rows, {self.next} done of {self.source}")


@dataclass(kw_only=True)
class TokenStoreHeader(RowLayout):
    """Sizes, tokenizers and progress of a store."""

    text_tokenizer: str
    image_tokenizer: str
    splits: dict[str, SplitHeader]
    complete: bool = False
    checksums: bool = False
    """Whether the store has checksums; False for headers of earlier versions, which lack the field."""
    part: Part | None = None
    """The part of the data set that is in the store; None: all of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [name for name, kind in _KINDS.items() if not isinstance(getattr(self, name), kind)]
        if wrong:
            raise ValueError(f"{wrong[0]} is {getattr(self, wrong[0])!r}")
        if self.part is not None and self.splits and self.part.samples.keys() != self.splits.keys():
            raise ValueError(f"part has samples of {', '.join(self.part.samples)}")

    def values(self) -> dict[str, Any]:
        """All fields as plain values; those that earlier versions lack only where they hold something."""
        return {name: value for name, value in asdict(self).items() if name not in _LATER or value}

    def save(self, folder: Path) -> None:
        """Replace the header in one step, so that a reader or a kill finds the old header or the new one."""
        values = {"version": VERSION, "dtype": self.dtype.name, **self.values()}
        if self.text_fields == (CAPTION,):  # as in stores of earlier versions
            del values["text_fields"]
        if self.checksums:
            values["crc32"] = _checksum(values)
        write_text(folder / HEADER, json.dumps(values, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> TokenStoreHeader:
        """Read and check a header.

        Raises:
            UserError: it is missing, damaged or of another version.
        """
        file = folder / HEADER
        try:
            values = json.loads(read_file(file, _MOST_BYTES).decode("utf-8"))
        except UnreadableError as error:
            if error.missing:
                raise UserError(f"{folder} has no {HEADER}: not a token store; run task=tokenize") from None
            raise UserError(f"{file} {error}; copy the token store again or run task=tokenize again") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not JSON ({error}); {START_AGAIN}") from None
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise UserError(f"{file} has version {version}, this program reads {VERSION}; {START_AGAIN}")
        found = values.pop("crc32", None)
        if (found is not None or values.get("checksums")) and found != _checksum(values):
            raise UserError(f"{file} is damaged (its checksum is wrong); {START_AGAIN}")
        try:
            del values["version"]
            dtype = values.pop("dtype")
            splits = {
                name: SplitHeader(**{"keys_crc32": None, "sums_crc32": None, **split})
                for name, split in values.pop("splits").items()
            }
            y, x = values.pop("grid")
            for name in {"text_fields", "image_fields"} & values.keys():
                values[name] = tuple(values[name])
            if "part" in values:
                values["part"] = Part(**values["part"])
            header = cls(grid=(y, x), splits=splits, **values)
            if header.dtype.name != dtype:
                raise ValueError(f"dtype is {dtype}, the sizes ask for {header.dtype.name}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{file} is damaged ({error}); {START_AGAIN}") from None
        return header


def _checksum(values: dict[str, Any]) -> int:
    """CRC-32 of the values of a header, in any order and spacing."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def rows_file(folder: Path, split: str) -> Path:
    """The rows of a split, except where they lie in pieces (`row_files`)."""
    return folder / f"{split}.bin"


def piece_file(folder: Path, split: str, number: int, count: int) -> Path:
    """Piece `number` of `count` of the rows of a split in a joined store."""
    return folder / f"{split}.{number:04}-of-{count:04}.bin"


def row_files(folder: Path, split: str) -> list[Path]:
    """The files that hold the rows of a split, in order: one, or the pieces of a joined store.

    Raises:
        UserError: the folder holds pieces of two joins.
    """
    counts = {int(match[1]) for name in _names(folder) if (match := _PIECE.fullmatch(name.removeprefix(f"{split}.")))}
    if rows_file(folder, split).exists() or not counts:
        return [rows_file(folder, split)]
    if len(counts) > 1:
        raise UserError(f"{folder} holds pieces of two joined stores; {START_AGAIN}")
    (count,) = counts
    return [piece_file(folder, split, number, count) for number in range(1, count + 1)]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # whoever opens a file in it says what is wrong
        return []


def keys_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.keys.txt"


def checksums_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.crc32"
