"""Reader of foreign `.pt` files: it runs nothing in them and refuses damaged ones."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview_pl.checkpoints.safe_pickle.allowed import Array, Malformed, Name, Refused, Storage, View
from cogview_pl.checkpoints.safe_pickle.archives import Contents, read_contents
from cogview_pl.errors import UserError

_MAX_DEPTH = 32

_log = logging.getLogger(__name__)


def read_pt(file: Path, key: str, *, verify: bool = True) -> dict[Any, Any]:
    """The dictionary in a `.pt` file, on the CPU; tensors are mapped into memory where their alignment allows it.

    It reads dense tensors and plain Python values only; they take at most twice the size of the file and some hundred
    megabytes. Sets and NumPy arrays become lists, NumPy numbers become Python numbers, types become their names.

    Args:
        file: a file of torch.save, in its zip form or in the form before version 1.6.
        key: config key that error messages name.
        verify: compare the checksums of the file, which reads it once (3 GB/s from the page cache). Files of torch
            before 1.6 have no checksums; then it logs a warning.

    Raises:
        UserError: the file is missing, damaged, no dictionary of such values, or asks to run code.
    """
    try:
        if not is_file(file):
            raise UserError(f"{key}: {file} does not exist or is no file; give the released .pt file or its folder")
        contents = read_contents(file, verify=verify)
        found = _Values(file, contents).plain(contents.value)
    except UserError:
        raise
    except Refused as error:
        raise UserError(
            f"{key}: {file} was refused: it asks {shown(error)}, and a file of weights has no need to; get the file "
            "from a source that you trust"
        ) from error
    except PermissionError as error:
        raise UserError(f"{key}: {file} may not be read; change its permissions or copy it") from error
    except Exception as error:  # zipfile, pickletools and torch raise many kinds for damaged bytes
        reason = shown(error) or type(error).__name__
        raise UserError(f"{key}: {file} is damaged or no PyTorch file ({reason}); download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{key}: {file} holds a {type(found).__name__}, not a dictionary of weights")
    if not contents.has_checksums:
        _log.warning("%s: %s is of PyTorch before 1.6 and has no checksums: damage in it goes unnoticed", key, file)
    return found


def is_file(path: Path) -> bool:
    """Whether a path is a regular file; False for paths that cannot be examined."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def shown(text: object, limit: int = 160) -> str:
    """Text of a foreign file, made safe for a message of one line."""
    line = " ".join(str(text)[: 2 * limit].split())
    return "".join(character if character.isprintable() else "?" for character in line)[:limit]


class _Values:
    """Makes tensors and plain values from the descriptions in the pickle of a file."""

    def __init__(self, file: Path, contents: Contents) -> None:
        self.file = file
        self.records = contents.records
        self.size = file.stat().st_size
        self.bytes_of_tensors = 0
        self.made: dict[int, Any] = {}
        """Results by the id of their description, since a pickle may refer to one object several times."""

    def plain(self, value: object, depth: int = 0) -> Any:
        """The value with tensors instead of descriptions.

        Raises:
            Malformed: it is nested too deeply or contains itself, or a part of it is no value.
        """
        if value is None or isinstance(value, (bool, int, float, str, bytes)):
            return value
        if depth > _MAX_DEPTH:
            raise Malformed(f"values nested more than {_MAX_DEPTH} deep")
        if id(value) not in self.made:
            self.made[id(value)] = self._make(value, depth + 1)
        return self.made[id(value)]

    def _make(self, value: object, depth: int) -> Any:
        match value:
            case dict():
                return {name: self.plain(item, depth) for name, item in value.items()}
            case list():
                return [self.plain(item, depth) for item in value]
            case tuple():
                return tuple(self.plain(item, depth) for item in value)
            case View():
                return self._tensor(value)
            case Name():
                return value.dotted
            case Array() if value.values is not None:
                return value.values
        raise Malformed(f"a value of the kind {type(value).__name__}")

    def _tensor(self, view: View) -> Tensor:
        self.bytes_of_tensors += view.nbytes
        if self.bytes_of_tensors > 2 * self.size:  # twice, since tied weights are two tensors in one storage
            raise Malformed("tensors that are larger than the file")
        storage = self._storage(view.storage)
        tensor = torch.empty(0, dtype=view.storage.dtype)
        return tensor.set_(storage, view.offset, view.shape, view.stride) if view.nbytes else tensor.reshape(view.shape)

    def _storage(self, storage: Storage) -> torch.UntypedStorage:
        if id(storage) not in self.made:
            start, nbytes = self.records.get(storage.key, (0, -1))
            if nbytes != storage.nbytes or start + nbytes > self.size:
                raise Malformed(f"no {storage.nbytes} bytes of storage {storage.key[:20]}")
            part = self._mapped[start : start + nbytes]
            aligned = start % storage.dtype.itemsize == 0  # torch needs aligned numbers
            self.made[id(storage)] = part if aligned else part.clone()
        return self.made[id(storage)]

    @cached_property
    def _mapped(self) -> torch.UntypedStorage:
        """The file, mapped privately: writes into tensors do not reach the file."""
        mapped: Any = torch.UntypedStorage.from_file(str(self.file), False, self.size)
        return mapped
