"""Pickles opcode by opcode: what each stands for, and what is refused in which words."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from cogview_pl.checkpoints.safe_pickle.allowed import Malformed, Name, Refused, Storage
from cogview_pl.checkpoints.safe_pickle.opcodes import read_pickle

from ..hostile import call, name, number, several, storage, text


def read(value: bytes) -> tuple[object, dict[str, Storage]]:
    """The value and the storages of a pickle, which is read to its end and no further."""
    stream = io.BytesIO(b"before\x80\x02" + value + b".after")
    stream.seek(6)
    found = read_pickle(stream)
    assert stream.read() == b"after"
    return found


VALUES: dict[str, tuple[bytes, object]] = {
    "one byte": (b"K\xff", 255),
    "two bytes": (b"M\x01\x02", 513),
    "four bytes": (b"J\xfe\xff\xff\xff", -2),
    "long": (number(2**40), 2**40),
    "float": (b"G\xbf\xf8\0\0\0\0\0\0", -1.5),
    "text": (text("Ω"), "Ω"),
    "short text of Python 2": (b"U\x02ab", "ab"),
    "text of Python 2": (b"T\x02\0\0\0ab", "ab"),
    "constants": (b"(N\x88\x89)t", (None, True, False, ())),
    "tuples": (b"K\1\x85K\2\x86K\3K\4\x87", (((1,), 2), 3, 4)),
    "tuple from a mark": (b"K\7(K\1(K\2tt\x86", (7, (1, (2,)))),
    "list": (b"]K\1a(K\2K\3e", [1, 2, 3]),
    "dictionary": (b"}" + text("b") + b"K\1s(" + text("a") + b"K\2K\3]u", {"b": 1, "a": 2, 3: []}),
    "references": (b"](K\5q\1K\6q\2K\7r\x2c\1\0\0h\1j\x2c\1\0\0h\2e", [5, 6, 7, 5, 7, 6]),
    "largest keys": (b"}(" + number(2**31 - 1) + b"K\1" + number(1 - 2**31) + b"K\2u", {2**31 - 1: 1, 1 - 2**31: 2}),
    "attributes of a dictionary": (b"}K\1K\2s}" + text("x") + b"K\3sb", {1: 2}),
    "name": (name("torch", "float16"), Name("torch.float16")),
    "size": (call(("torch", "Size"), several(number(2), number(3))), (2, 3)),
}


@pytest.mark.parametrize("title", VALUES)
def test_what_opcodes_stand_for(title: str) -> None:
    written, wanted = VALUES[title]
    found, storages = read(written)
    assert found == wanted and type(found) is type(wanted) and storages == {}
    if isinstance(found, dict):
        assert list(found) == list(wanted)  # type: ignore[call-overload]


def test_what_python_writes_of_plain_values() -> None:
    value = {"a": [1, -5, 70_000, 2**40, 1.5, None, True, "é"], "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), 3: {}}
    value["long"] = [[number] for number in range(300)]  # more references than one byte counts
    value["again"] = value["long"]
    found, _ = read_pickle(io.BytesIO(pickle.dumps(value, protocol=2)))
    assert found == value and found["again"] is found["long"]  # type: ignore[index]


def test_storages_are_found_once() -> None:
    old = several(
        text("storage"), name("torch", "HalfStorage"), text("k"), text("cpu"), number(7), b"N"
    )  # as torch wrote them before 1.6
    found, storages = read(several(storage(0), storage(5, "1", "LongStorage"), old + b"Q", storage(0)))
    assert isinstance(found, tuple) and found[3] is found[0] is storages["0"]
    assert {key: (one.key, one.dtype, one.numel, one.nbytes) for key, one in storages.items()} == {
        "0": ("0", torch.float32, 0, 0),
        "1": ("1", torch.int64, 5, 40),
        "k": ("k", torch.float16, 7, 14),
    }


def reference(*parts: bytes) -> bytes:
    return several(*parts) + b"Q"


HALF, KEY, CPU = name("torch", "HalfStorage"), text("0"), text("cpu")
SIZE = ("torch", "Size")
REFUSED: dict[str, tuple[bytes, type[Exception], str]] = {
    "protocol 1": (b"\x80\x01N", Malformed, "pickle protocol 1; torch.save writes 2"),
    "protocol 3": (b"\x80\x03N", Malformed, "pickle protocol 3; torch.save writes 2"),
    "protocol of any place": (b"N\x80\x04", Malformed, "pickle protocol 4; torch.save writes 2"),
    "opcode": (b"NN\x81", Malformed, "opcode NEWOBJ, which torch.save does not write"),
    "nothing at all": (b"", Malformed, "an empty stack"),
    "memo of nothing": (b"q\0", Malformed, "an empty stack"),
    "reference to nothing": (b"Nq\0h\1", Malformed, "no value 1 to refer to"),
    "tuple of too few": (b"N\x86", Malformed, "an empty stack"),
    "tuple without a mark": (b"Nt", Malformed, "no mark"),
    "value over a mark": (b"](a", Malformed, "an empty stack"),
    "item of a tuple": (b")Na", Malformed, "items of a tuple"),
    "items of a dictionary": (b"}(Ne", Malformed, "items of a dict"),
    "entry of a list": (b"]K\1Ns", Malformed, "entries of a list"),
    "odd entries": (b"}(K\1NK\2u", Malformed, "entries of a dict"),
    "key that is true": (b"}\x88Ns", Malformed, "a bool as key of a dictionary"),
    "key that is a float": (b"}G" + bytes(8) + b"Ns", Malformed, "a float as key of a dictionary"),
    "large key": (b"}" + number(2**31) + b"Ns", Malformed, "a int as key of a dictionary"),
    "small key": (b"}" + number(-(2**31)) + b"Ns", Malformed, "a int as key of a dictionary"),
    "unknown name": (name("os", "system"), Refused, "to run os.system"),
    "name with a space": (name("torch", "Size x"), Refused, "to run torch.Size x"),
    "type that is called": (call(("torch", "HalfStorage")), Refused, "to run torch.HalfStorage"),
    "value that is called": (text("torch.Size") + b")R", Refused, "to run str"),
    "call with a list": (name(*SIZE) + b"]R", Malformed, "arguments of torch.Size"),
    "state of a list": (b"]}b", Refused, "to set the state of a list"),
    "state of nothing": (b"Nb", Malformed, "an empty stack"),
    "no tuple": (text("storage") + b"Q", Refused, "for an object that is no storage"),
    "empty tuple": (b")Q", Refused, "for an object that is no storage"),
    "another object": (
        reference(text("module"), HALF, KEY, CPU, number(1)),
        Refused,
        "for an object that is no storage",
    ),
}
REFUSED |= {
    f"reference with {title}": (reference(text("storage"), *parts), Malformed, "a reference to a storage")
    for title, parts in {
        "too little": (HALF, KEY, CPU),
        "too much": (HALF, KEY, CPU, number(1), b"N", b"N"),
        "a view": (HALF, KEY, CPU, number(1), b")"),
        "a name as text": (text("HalfStorage"), KEY, CPU, number(1)),
        "a type of numbers": (name("torch", "float16"), KEY, CPU, number(1)),
        "a number as key": (HALF, number(0), CPU, number(1)),
        "a length below 0": (HALF, KEY, CPU, number(-1)),
        "a length beyond all": (HALF, KEY, CPU, number(2**63)),
        "no length": (HALF, KEY, CPU, b"\x88"),
    }.items()
}


@pytest.mark.parametrize("title", REFUSED)
def test_what_is_refused(title: str) -> None:
    written, kind, words = REFUSED[title]
    with pytest.raises(kind) as error:
        read(written)
    assert str(error.value) == words


@pytest.mark.parametrize("second", [storage(5), storage(4, kind="IntStorage")])
def test_a_storage_has_one_form(second: bytes) -> None:
    with pytest.raises(Malformed, match=r"^storage 0 in two forms$"):
        read(storage(4) + second)


def test_the_longest_storage() -> None:
    _, storages = read(storage(2**63 - 1, "x" * 30))
    assert storages["x" * 30].numel == 2**63 - 1
    with pytest.raises(Malformed, match=f"^storage {'x' * 20} in two forms$"):
        read(storage(1, "x" * 30) + storage(2, "x" * 30))
