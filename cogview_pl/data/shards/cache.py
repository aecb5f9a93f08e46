"""Indices of tar shards that are kept between runs, so that headers are read once.

Each shard has a file in the folder of caches, named by a hash of its path: a checksum, then arrays in the form of
safetensors. It counts while size and modification time of the shard are those of its time. Losing it loses no data, so
it is not synced, and a folder that cannot be written is no error.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cogview_pl.data.left_out import LeftOut
from cogview_pl.data.packed import Texts
from cogview_pl.data.shards.table import ShardTable

_log = logging.getLogger(__name__)

_VERSION = 1
"""Of the form of a file and of the rules that make samples of members; indices of other versions are read anew."""
_DIGEST_BYTES = 16
_MAX_BYTES = 2**34
"""Largest file that is read."""
_COLUMNS = ("fractions", "member_ends", "kinds", "blocks", "sizes")
_PLAIN = ("extensions", "num_longer_keys", "first_longer_key")
_ABOUT = "about"
_SETTLED = 2  # seconds after which a change of a file gives it another modification time, also where times are coarse


class _DamagedError(Exception):
    """The file of an index is damaged."""


def cache_folder() -> Path:
    """Folder of the indices: in `XDG_CACHE_HOME`, or `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "cogview_pl", "shards")


def kept_table(shard: Path, state: os.stat_result) -> ShardTable | None:
    """The index of a shard; None where there is none of this state of the shard. Says that an index is damaged.

    Args:
        shard: the tar file.
        state: its status.
    """
    file = _file_of(shard)
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise _DamagedError
        return _read(file.read_bytes(), _state(state))
    except OSError:
        return None
    except _DamagedError:
        _log.warning("%s, the kept index of %s, is damaged; the shard is read anew", file, shard)
        return None


def keep_table(shard: Path, state: os.stat_result, table: ShardTable) -> None:
    """Keep the index of a shard, if that can be written.

    Args:
        shard: the tar file.
        state: its status before its headers were read. If it has changed since, or just before, it is not kept.
        table: the index.
    """
    file = _file_of(shard)
    with suppress(OSError):
        if _state(shard.stat()) != _state(state) or time.time() < state.st_mtime + _SETTLED:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        _replace(file, _written(table, _state(state)))


def _replace(file: Path, data: bytes) -> None:
    """Replace a file in one step; several processes may do so at once."""
    descriptor, draft = tempfile.mkstemp(dir=file.parent, prefix=".")
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
        os.replace(draft, file)
    except BaseException:
        os.unlink(draft)
        raise


def _file_of(shard: Path) -> Path:
    name = xxhash.xxh3_128_hexdigest(os.fsencode(os.path.abspath(shard)))
    return cache_folder() / f"{name}.index"


def _state(found: os.stat_result) -> list[int]:
    return [_VERSION, found.st_size, found.st_mtime_ns]


def _written(table: ShardTable, state: list[int]) -> bytes:
    about = {
        "state": state,
        "left_out": table.left_out.kinds(),
        "table": {name: getattr(table, name) for name in _PLAIN},
    }
    arrays = {name: getattr(table, name) for name in _COLUMNS}
    arrays |= {"key_bytes": table.keys.data, "key_ends": table.keys.ends}
    arrays[_ABOUT] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return xxhash.xxh3_128_digest(data) + data


def _read(content: bytes, state: list[int]) -> ShardTable | None:
    """The index in a file; None where it is of another state of the shard."""
    data = memoryview(content)[_DIGEST_BYTES:]
    if xxhash.xxh3_128_digest(data) != content[:_DIGEST_BYTES]:
        raise _DamagedError
    try:
        arrays = load(bytes(data))
        about: dict[str, Any] = json.loads(arrays[_ABOUT].tobytes())
        if about["state"] != state:
            return None
        left_out = LeftOut()
        for kind, first, count in about["left_out"]:
            left_out.add(kind, first, count)
        keys = Texts(arrays["key_bytes"], arrays["key_ends"])
        columns: dict[str, Any] = {name: arrays[name] for name in _COLUMNS}
        return ShardTable(keys, **columns, **about["table"], left_out=left_out)
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise _DamagedError from None
