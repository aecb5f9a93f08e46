"""What pickles may name, function by function: tensors that fit into their storage, NumPy numbers, and limits."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from cogview_pl.checkpoints.safe_pickle.allowed import FUNCTIONS, Budget, Malformed, Refused, View
from cogview_pl.checkpoints.safe_pickle.opcodes import read_pickle

from ..hostile import LITTLE_ENDIAN, TENSOR, array, call, name, number, number_type, raw, several, storage, tensor, text

U1 = number_type("u1", number(3), text("|"), *LITTLE_ENDIAN[2:])
F4 = number_type("f4", *LITTLE_ENDIAN)
SCALAR = ("numpy.core.multiarray", "scalar")


def read(value: bytes) -> object:
    return read_pickle(io.BytesIO(b"\x80\x02" + value + b"."))[0]


TENSORS = {
    "whole": ((4,), (1,), 0, 16),
    "last number": ((1,), (9,), 3, 4),
    "columns": ((2, 2), (1, 2), 0, 16),
    "rows": ((2, 2), (2, 1), 0, 16),
    "every second": ((2,), (2,), 1, 8),
    "one number four times": ((4,), (0,), 3, 16),
    "scalar": ((), (), 3, 4),
    "nothing behind the end": ((0, 3), (3, 1), 4, 0),
    "nothing, wide": ((2**31 - 1, 0), (2**63 - 1, 0), 0, 0),
    "eight dimensions": ((1,) * 8, (1,) * 8, 0, 4),
}


@pytest.mark.parametrize("title", TENSORS)
def test_tensors_that_fit_into_their_storage(title: str) -> None:
    shape, stride, offset, nbytes = TENSORS[title]
    found = read(tensor(shape, stride, offset=offset))
    assert isinstance(found, View)
    assert (found.shape, found.stride, found.offset, found.nbytes) == (shape, stride, offset, nbytes)
    assert (found.storage.key, found.storage.numel, found.storage.dtype) == ("0", 4, torch.float32)


LOOSE = {
    "one more": ((5,), (1,), 0, "a tensor [5] in a storage of 4 numbers"),
    "one too far": ((4,), (1,), 1, "a tensor [4] in a storage of 4 numbers"),
    "scalar behind the end": ((), (), 4, "a tensor [] in a storage of 4 numbers"),
    "rows too far": ((2, 2), (3, 1), 0, "a tensor [2, 2] in a storage of 4 numbers"),
    "one number too often": ((5,), (0,), 0, "a tensor [5] in a storage of 4 numbers"),
    "too wide": ((2**31, 0), (1, 1), 0, "sizes of a tensor"),
    "nine dimensions": ((1,) * 9, (1,) * 9, 0, "sizes of a tensor"),
    "fewer strides": ((1, 1), (1,), 0, "sizes of a tensor"),
    "more strides": ((1,), (1, 1), 0, "sizes of a tensor"),
    "stride beyond numbers": ((1,), (2**63,), 0, "sizes of a tensor"),
    "offset beyond numbers": ((0,), (1,), 2**63, "arguments of a tensor"),
}


@pytest.mark.parametrize("title", LOOSE)
def test_tensors_that_do_not(title: str) -> None:
    shape, stride, offset, words = LOOSE[title]
    with pytest.raises(Malformed) as error:
        read(tensor(shape, stride, offset=offset))
    assert str(error.value) == words


ONE = several(number(1))
PARAMETER = ("torch._utils", "_rebuild_parameter")
ORDERED = ("collections", "OrderedDict")
DTYPE = ("numpy", "dtype")
VALUES: dict[str, tuple[bytes, object]] = {
    "empty dictionary": (call(ORDERED), {}),
    "pairs in lists": (call(ORDERED, b"](](" + text("a") + b"K\1e](" + text("b") + b"K\2ee"), {"a": 1, "b": 2}),
    "pairs in tuples": (call(ORDERED, several(several(text("a"), b"K\1"))), {"a": 1}),
    "set": (call(("__builtin__", "set"), b"](K\2K\1e"), [2, 1]),
    "set of a tuple": (call(("builtins", "set"), several(b"K\2")), [2]),
    "empty set": (call(("builtins", "set")), []),
    "empty size": (call(("torch", "Size")), ()),
    "bytes": (raw(b"\xff\0a"), b"\xff\0a"),
    "bytes with the codec's other name": (call(("_codecs", "encode"), text("é"), text("latin-1")), b"\xe9"),
    "empty bytes": (call(("__builtin__", "bytes")), b""),
    "NumPy 1": (call(SCALAR, F4, raw(np.float32(0.5).tobytes())), 0.5),
    "NumPy 2": (call(("numpy._core.multiarray", "scalar"), F4, raw(np.float32(-2).tobytes())), -2.0),
}


@pytest.mark.parametrize("title", VALUES)
def test_what_functions_make(title: str) -> None:
    written, wanted = VALUES[title]
    found = read(written)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize("metadata", [b"N", b"}", b"]"])
def test_tensors_without_metadata_and_parameters(metadata: bytes) -> None:
    arguments = (storage(4), number(1), several(number(3)), ONE, b"\x88", b"N")
    found = read(call(PARAMETER, call(TENSOR, *arguments, metadata), b"\x88", call(ORDERED)))
    assert isinstance(found, View) and (found.offset, found.shape) == (1, (3,))


def values(written: bytes) -> object:
    return getattr(read(written), "values")  # noqa: B009


ORDERS = {"<": [1, 2], "=": [1, 2], ">": [256, 512], "|": [1, 2]}


@pytest.mark.parametrize("order", ORDERS)
def test_byte_orders_of_arrays(order: str) -> None:
    kind = number_type("u2", number(3), text(order), *LITTLE_ENDIAN[2:])
    assert values(array((2,), kind, raw(b"\1\0\2\0"))) == ORDERS[order]


def test_shapes_of_arrays() -> None:
    data = raw(bytes(range(6)))
    assert values(array((2, 3), U1, data)) == [[0, 1, 2], [3, 4, 5]]
    columns = several(number(1), several(number(2), number(3)), U1, b"\x88", data)
    assert values(EMPTY + columns + b"b") == [[0, 2, 4], [1, 3, 5]]
    assert values(array((), U1, raw(b"\7"))) == 7
    assert values(array((4096,), U1, raw(bytes(4096)))) == [0] * 4096
    assert values(array((64, 0, 64), U1, raw(b""))) == [[] for _ in range(64)]


def state_of_dtype(*changes: tuple[int, bytes]) -> bytes:
    state = list(LITTLE_ENDIAN)
    for place, value in changes:
        state[place] = value
    return array((1,), number_type("u1", *state), raw(b"\1"))


EMPTY = call((SCALAR[0], "_reconstruct"), name("numpy", "ndarray"), several(number(0)), raw(b"b"))
STATE = (number(1), several(number(1)), U1, b"\x89", raw(b"\1"))
REFUSED: dict[str, tuple[bytes, str]] = {
    "entries as a dictionary": (call(ORDERED, b"}"), "entries of a dictionary"),
    "entry as a text": (call(ORDERED, b"]" + text("ab") + b"a"), "entries of a dictionary"),
    "entry of three": (call(ORDERED, several(several(text("a"), b"N", b"N"))), "entries of a dictionary"),
    "entry of one": (call(ORDERED, several(several(text("a")))), "entries of a dictionary"),
    "key that is no text": (call(ORDERED, several(several(b"K\1", b"N"))), "entries of a dictionary"),
    "set of a text": (call(("builtins", "set"), text("ab")), "items of a set"),
    "size below 0": (call(("torch", "Size"), several(number(-1))), "sizes of a tensor"),
    "size as a list": (call(("torch", "Size"), b"]K\1a"), "sizes of a tensor"),
    "size that is true": (call(("torch", "Size"), several(b"\x88")), "sizes of a tensor"),
    "codec": (call(("_codecs", "encode"), text("a"), text("utf-8")), "for the codec utf-8"),
    "codec that is no text": (call(("_codecs", "encode"), text("a"), b"N"), "for a codec"),
    "bytes of a number": (call(("_codecs", "encode"), b"K\1", text("latin1")), "for the codec latin1"),
    "tensor without a storage": (call(TENSOR, b"N", number(0), ONE, ONE), "arguments of a tensor"),
    "offset that is true": (call(TENSOR, storage(4), b"\x88", ONE, ONE), "arguments of a tensor"),
    "tensor with metadata": (
        call(TENSOR, storage(4), number(0), ONE, ONE, b"\x89", b"N", b"]Na"),
        "arguments of a tensor",
    ),
    "parameter": (call(PARAMETER, b"N"), "a parameter that is no tensor"),
    "number of a text": (call(SCALAR, text("f4"), raw(bytes(4))), "a NumPy number"),
    "number of too few bytes": (call(SCALAR, F4, raw(bytes(3))), "the bytes of a NumPy array"),
    "number of too many bytes": (call(SCALAR, F4, raw(bytes(8))), "the bytes of a NumPy array"),
    "number as text": (call(SCALAR, F4, text("abcd")), "the bytes of a NumPy array"),
    "number without a byte order": (
        call(SCALAR, number_type("f4"), raw(bytes(4))),
        "a NumPy dtype without a byte order",
    ),
    "objects": (number_type("O"), "for a NumPy array of anything but numbers"),
    "dtype that is no text": (call(DTYPE, b"K\1"), "for a NumPy array of anything but numbers"),
    "short state of a dtype": (
        array((1,), number_type("u1", *LITTLE_ENDIAN[:7]), raw(b"")),
        "the state of a NumPy dtype",
    ),
    "long state of a dtype": (number_type("u1", *LITTLE_ENDIAN, b"N"), "the state of a NumPy dtype"),
    "state of a dtype as text": (
        call(DTYPE, text("u1"), b"\x89", b"\x88") + text("<" * 8) + b"b",
        "the state of a NumPy dtype",
    ),
    "byte order": (state_of_dtype((1, text("!"))), "the state of a NumPy dtype"),
    "byte order that is no text": (state_of_dtype((1, b")")), "the state of a NumPy dtype"),
    **{
        f"part {place} of a dtype": (state_of_dtype((place, b"K\7")), "for a NumPy array of anything but numbers")
        for place in range(2, 8)
    },
    "array of another class": (EMPTY.replace(b"ndarray", b"dtype"), "for a NumPy array of another class"),
    "array that is not empty": (
        call((SCALAR[0], "_reconstruct"), name("numpy", "ndarray"), ONE, raw(b"b")),
        "for a NumPy array of another class",
    ),
    "state of an array as text": (EMPTY + text("abcde") + b"b", "the state of a NumPy array"),
    "short state of an array": (EMPTY + several(*STATE[:4]) + b"b", "the state of a NumPy array"),
    "long state of an array": (EMPTY + several(*STATE, b"N") + b"b", "the state of a NumPy array"),
    "array of a named type": (EMPTY + several(*STATE[:2], text("u1"), *STATE[3:]) + b"b", "the state of a NumPy array"),
    "array longer than its bytes": (array((2,), U1, raw(b"\1")), "the bytes of a NumPy array"),
    "long array": (array((4097,), U1, raw(bytes(4097))), "a NumPy array of more than 4096 numbers"),
    "many empty lists": (array((4097, 0), U1, raw(b"")), "a NumPy array of more than 4096 numbers"),
}


@pytest.mark.parametrize("title", REFUSED)
def test_what_is_refused(title: str) -> None:
    written, words = REFUSED[title]
    with pytest.raises((Malformed, Refused)) as error:
        read(written)
    assert str(error.value) == words
    questions = ("for a", "for the codec")
    assert isinstance(error.value, Refused) == str(error.value).startswith(questions)


def test_copies_are_limited() -> None:
    """What the functions make of what a pickle holds already: it could name one value again and again."""
    budget = Budget()
    FUNCTIONS["collections.OrderedDict"](budget, [("a", 1), ("b", 2), ("c", 3)])
    FUNCTIONS["builtins.set"](budget, [1] * 10)
    FUNCTIONS["_codecs.encode"](budget, "x" * 100, "latin1")
    made = FUNCTIONS["numpy.dtype"](budget, "u1")
    made.byte_order = "|"  # type: ignore[attr-defined]
    FUNCTIONS["numpy.core.multiarray.scalar"](budget, made, b"\1")
    assert budget.copied == 114
    budget.copy((4 << 20) - 114)
    with pytest.raises(Malformed, match="copied again and again"):
        budget.copy(1)


def test_the_number_of_tensors_is_limited() -> None:
    budget = Budget()
    for _ in range(1 << 16):
        budget.add_tensor()
    _, storages = read_pickle(io.BytesIO(b"\x80\x02" + storage(4) + b"."))
    assert budget.copied == 0
    with pytest.raises(Malformed, match=r"^more than 65536 tensors$"):
        FUNCTIONS["torch._utils._rebuild_tensor_v2"](budget, storages["0"], 0, (1,), (1,))
