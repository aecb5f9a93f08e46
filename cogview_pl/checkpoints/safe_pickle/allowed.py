"""Names that pickles of PyTorch files may use: functions that check numbers, and classes that describe tensors.

The functions replace those that a pickle names. Their results are never larger than the pickle; `load` makes the
tensors later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

_MAX_TENSORS = 1 << 16  # the largest released file has about 800
_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**31  # along one dimension
_MAX_ARRAY = 4096  # numbers of a NumPy array; the state of NumPy's generator has 624

# Bytes, numbers and items that functions may copy. Without a limit, a short pickle could name one long value many
# times and get a copy each time.
_MAX_COPIED = 4 << 20


class Refused(Exception):
    """The pickle asks to run code, or for a thing that weights do not need; the text goes after `it asks`."""


class Malformed(Exception):
    """The pickle is not one that torch.save writes."""


@dataclass(frozen=True, slots=True)
class Name:
    """A dotted name in a pickle, and nothing more."""

    dotted: str


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """Numbers of one or more tensors: the record `key` of the file."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """A tensor: a part of a storage that is long enough for it; offset and strides are in numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize


@dataclass(eq=False, slots=True)
class Array:
    """A NumPy array: numbers in lists nested by its shape, or one number; None until it is filled."""

    values: object = None


@dataclass(eq=False, slots=True)
class NumberType:
    """A NumPy dtype of numbers, such as `u4`; pickles set the byte order in a second step."""

    code: str
    byte_order: str | None = None

    def numpy(self) -> np.dtype:
        if self.byte_order is None:
            raise Malformed("a NumPy dtype without a byte order")
        return np.dtype(self.byte_order + self.code)


Value = object
"""None, bool, int, float, str, bytes, tuple, list, dict, or one of the classes above."""

STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
_NUMBERS = {"b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"}
_BYTE_ORDERS = {"<", ">", "=", "|"}


class Budget:
    """Counts copies and tensors of one pickle."""

    def __init__(self) -> None:
        self.copied = 0
        self.tensors = 0

    def copy(self, size: int) -> None:
        """Raises Malformed beyond the limit of copies."""
        self.copied += size
        if self.copied > _MAX_COPIED:
            raise Malformed("values that are copied again and again")

    def add_tensor(self) -> None:
        """Raises Malformed beyond the limit of tensors."""
        self.tensors += 1
        if self.tensors > _MAX_TENSORS:
            raise Malformed(f"more than {_MAX_TENSORS} tensors")


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS or not all(map(is_count, value)):
        raise Malformed("sizes of a tensor")
    return value


# --- the functions that pickles name ---


def _ordered_dict(budget: Budget, items: object = ()) -> dict[Value, Value]:
    """Python 2 passes the entries as a list of pairs; Python 3 sets them later."""
    if not isinstance(items, (list, tuple)):
        raise Malformed("entries of a dictionary")
    budget.copy(len(items))
    found: dict[Value, Value] = {}
    for entry in items:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or type(entry[0]) is not str:
            raise Malformed("entries of a dictionary")
        found[entry[0]] = entry[1]
    return found


def _list_of(budget: Budget, items: object = ()) -> list[Value]:
    """Sets become lists, so that no item is hashed."""
    if not isinstance(items, (list, tuple)):
        raise Malformed("items of a set")
    budget.copy(len(items))
    return list(items)


def _size(_: Budget, shape: object = ()) -> tuple[int, ...]:
    return _counts(shape)


def _bytes(_: Budget) -> bytes:
    """Protocol 2 writes empty bytes as a call without arguments."""
    return b""


def _encode(budget: Budget, text: object, encoding: object) -> bytes:
    """Protocol 2 writes bytes as Latin-1 text. Other codecs are not needed, and some are slow."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused(f"for the codec {encoding}" if type(encoding) is str else "for a codec")
    budget.copy(len(text))
    return text.encode("latin-1")


def _tensor(
    budget: Budget,
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    requires_grad: object = None,
    hooks: object = None,
    metadata: object = None,
) -> View:
    """A dense strided tensor, without gradients and hooks.

    Raises:
        Malformed: it reaches beyond its storage, or has more numbers than its storage (strides of 0).
    """
    if not isinstance(storage, Storage) or type(offset) is not int or not is_count(offset) or metadata:
        raise Malformed("arguments of a tensor")
    budget.add_tensor()
    view = View(storage, offset, _counts(shape), _counts(stride))
    if len(view.shape) != len(view.stride) or max(view.shape, default=0) >= _MAX_SIZE:
        raise Malformed("sizes of a tensor")
    last = offset + sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True))
    numel = math.prod(view.shape)
    if numel > storage.numel or (numel and last >= storage.numel):
        raise Malformed(f"a tensor {list(view.shape)} in a storage of {storage.numel} numbers")
    return view


def _parameter(_: Budget, data: object, requires_grad: object = None, hooks: object = None) -> View:
    if not isinstance(data, View):
        raise Malformed("a parameter that is no tensor")
    return data


def _number_type(_: Budget, code: object, align: object = None, copy: object = None) -> NumberType:
    if type(code) is not str or code not in _NUMBERS:
        raise Refused("for a NumPy array of anything but numbers")
    return NumberType(code)


def set_byte_order(target: NumberType, state: object) -> None:
    """State `(3, order, None, None, None, -1, -1, 0)`: no fields, no subarray, no metadata."""
    if type(state) is not tuple or len(state) != 8 or type(state[1]) is not str or state[1] not in _BYTE_ORDERS:
        raise Malformed("the state of a NumPy dtype")
    if state[2:] != (None, None, None, -1, -1, 0):
        raise Refused("for a NumPy array of anything but numbers")
    target.byte_order = state[1]


def _empty_array(_: Budget, kind: object, shape: object, code: object) -> Array:
    if kind != Name("numpy.ndarray") or shape != (0,):
        raise Refused("for a NumPy array of another class")
    return Array()


def fill(budget: Budget, target: Array, state: object) -> None:
    """State `(1, shape, dtype, by columns, bytes)`."""
    if type(state) is not tuple or len(state) != 5 or not isinstance(state[2], NumberType):
        raise Malformed("the state of a NumPy array")
    shape = _counts(state[1])
    target.values = _numbers(budget, state[2], shape, state[4], order="F" if state[3] else "C").tolist()


def _scalar(budget: Budget, number_type: object, data: object) -> Value:
    if not isinstance(number_type, NumberType):
        raise Malformed("a NumPy number")
    return _numbers(budget, number_type, (), data, order="C").item()


def _numbers(budget: Budget, number_type: NumberType, shape: tuple[int, ...], data: object, order: str) -> np.ndarray:
    dtype = number_type.numpy()
    if type(data) is not bytes or len(data) != math.prod(shape) * dtype.itemsize:
        raise Malformed("the bytes of a NumPy array")
    items = math.prod(max(size, 1) for size in shape)  # in a shape with a 0, other sizes still make empty lists
    if items > _MAX_ARRAY:
        raise Malformed(f"a NumPy array of more than {_MAX_ARRAY} numbers")
    budget.copy(items)
    return np.frombuffer(data, dtype).copy().reshape(shape, order=order)  # type: ignore[call-overload]


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # NumPy 1 and NumPy 2
FUNCTIONS: dict[str, Callable[..., Value]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "builtins.set": _list_of,
    "__builtin__.set": _list_of,  # its name in protocol 2
    "__builtin__.bytes": _bytes,
    "_codecs.encode": _encode,
    "numpy.dtype": _number_type,
    **{f"{module}._reconstruct": _empty_array for module in _NUMPY},
    **{f"{module}.scalar": _scalar for module in _NUMPY},
}
INERT = {
    "numpy.ndarray",
    *(f"torch.{storage}" for storage in STORAGES),
    *(str(dtype) for dtype in STORAGES.values()),
}
"""Names that a pickle may contain but not call."""
