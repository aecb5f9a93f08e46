"""Files of PyTorch written byte by byte: pickles put together from opcodes, in a zip archive with right checksums."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping

TENSOR = ("torch._utils", "_rebuild_tensor_v2")


def archive(pickle: bytes, records: Mapping[str, bytes] | None = None) -> bytes:
    """A `.pt` file with this pickle, and storages by their keys."""
    content = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
    content |= {f"data/{key}": data for key, data in (records or {}).items()}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, data in content.items():
            file.writestr(f"archive/{name}", data)
    return stream.getvalue()


def pickled(value: bytes) -> bytes:
    """A whole pickle: the dictionary `{"a": value}`."""
    return b"\x80\x02}" + text("a") + value + b"s."


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def several(*values: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(values) + b"t"


def call(function: tuple[str, str], *arguments: bytes) -> bytes:
    return name(*function) + several(*arguments) + b"R"


def raw(data: bytes) -> bytes:
    """Bytes as protocol 2 has them."""
    return call(("_codecs", "encode"), text(data.decode("latin-1")), text("latin1"))


def storage(numel: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return several(text("storage"), name("torch", kind), text(key), text("cpu"), number(numel)) + b"Q"


def tensor(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    *,
    offset: int = 0,
    numel: int = 4,
    key: str = "0",
    kind: str = "FloatStorage",
) -> bytes:
    """A tensor; without changes its storage is record `0` with 4 numbers in float32."""
    sizes = (several(*map(number, numbers)) for numbers in (shape, stride))
    hooks = call(("collections", "OrderedDict"))
    return call(TENSOR, storage(numel, key, kind), number(offset), *sizes, b"\x89", hooks)


def number_type(code: str, *state: bytes) -> bytes:
    """A NumPy dtype, with a state where one is given."""
    made = call(("numpy", "dtype"), text(code), b"\x89", b"\x88")
    return made + several(*state) + b"b" if state else made


LITTLE_ENDIAN = (number(3), text("<"), b"N", b"N", b"N", number(-1), number(-1), number(0))


def array(shape: tuple[int, ...], kind: bytes, data: bytes, module: str = "numpy._core.multiarray") -> bytes:
    """A NumPy array of a pickled dtype and pickled bytes."""
    empty = call((module, "_reconstruct"), name("numpy", "ndarray"), several(number(0)), raw(b"b"))
    return empty + several(number(1), several(*map(number, shape)), kind, b"\x89", data) + b"b"


def doubled(levels: int) -> bytes:
    """A tuple of two tuples, which are the same one, and so on: short to write, without end to walk through."""
    return b")" + b"".join(b"q%ch%c\x86" % (level, level) for level in range(levels))
