"""manifest.json: size and hash of every file in a folder of weights, compared when the folder is read.

It detects damage: flipped bits, cut files, files of another run. It is no signature: whoever can write the files can
write their hashes. XXH3 is faster than a disk, so the comparison takes less time than the load.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from pathlib import Path

import xxhash

from cogview_pl.durable.read import UnreadableError, read_file
from cogview_pl.durable.write import write_text
from cogview_pl.errors import UserError

MANIFEST = "manifest.json"
ALGORITHM = "xxh3_128"

_LARGEST = 1 << 20  # bytes of a manifest


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write size and hash of the named files of a folder."""
    files = {name: {"bytes": (folder / name).stat().st_size, ALGORITHM: file_hash(folder / name)} for name in names}
    write_text(folder / MANIFEST, json.dumps(files, indent=1, ensure_ascii=False) + "\n")


def require_undamaged(folder: Path, names: Iterable[str]) -> None:
    """Compare the named files of a folder with its manifest.

    Raises:
        UserError: a file is missing or differs, or the manifest cannot be read.
    """
    noted = _read(folder / MANIFEST)
    for name in names:
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing; copy the folder again")
        wanted = noted.get(name)
        if wanted is None:
            raise UserError(f"{folder / MANIFEST} does not list {name}; copy the folder again")
        if wanted != {"bytes": file.stat().st_size, ALGORITHM: file_hash(file)}:
            raise UserError(
                f"{file} is damaged: it is not the file that {MANIFEST} lists; copy the folder again, or set "
                "verify=false to read it all the same"
            )


def manifest_hash(folder: Path) -> str:
    """Hash of a manifest, which identifies the content of a folder without reading it."""
    return file_hash(folder / MANIFEST)


def file_hash(file: Path) -> str:
    """XXH3 of a file, 128 bits in hexadecimal."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        if file.stat().st_size:  # an empty file cannot be mapped
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                digest.update(content)
    return digest.hexdigest()


def _read(file: Path) -> dict[str, object]:
    try:
        found = json.loads(read_file(file, _LARGEST))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except UnreadableError as error:
        raise UserError(
            f"{file} {error}, so nothing vouches for the files beside it; copy the folder again, or set verify=false "
            "to read them all the same"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{file} is damaged ({reason}); copy the folder again") from error
    return found
