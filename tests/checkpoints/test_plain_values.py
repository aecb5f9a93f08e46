"""What is made of pickles: plain values and tensors of the file's size; all else is a message of one line."""

from __future__ import annotations

import os
import re
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview_pl.checkpoints.safe_pickle.archives import read_contents
from cogview_pl.checkpoints.safe_pickle.load import is_file, read_pt, shown
from cogview_pl.errors import UserError

from .hostile import LITTLE_ENDIAN, archive, array, call, name, number, number_type, pickled, raw, several, storage
from .hostile import tensor as tensor_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file.pt"


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as error:
        read_pt(file, "some.key")
    message = str(error.value)
    assert message.startswith(f"some.key: {file} ") and "\n" not in message
    return message.removeprefix(f"some.key: {file} ")


NUMBERS = number_type("u2", *LITTLE_ENDIAN)


def test_values_that_only_a_pickle_has_become_plain(file: Path) -> None:
    parts = (name("torch", "float16"), array((2,), NUMBERS, raw(b"\1\0\2\0")), array((), NUMBERS, raw(b"\3\0")), b"N")
    file.write_bytes(archive(pickled(several(*parts))))
    assert read_pt(file, "key") == {"a": ("torch.float16", [1, 2], 3, None)}


DEPTH = {"lists": (b"]", b"a"), "tuples": (b"", b"\x85"), "dictionaries": (b"}K\1", b"s")}


@pytest.mark.parametrize("kind", DEPTH)
def test_the_deepest_values(file: Path, kind: str) -> None:
    """32 values inside one another, in the dictionary that a file is."""
    opened, closed = DEPTH[kind]
    file.write_bytes(archive(pickled(opened * 32 + b"N" + closed * 32)))
    value, depth = read_pt(file, "key")["a"], 0
    while value is not None:
        (value,) = value.values() if isinstance(value, dict) else value
        depth += 1
    assert depth == 32
    file.write_bytes(archive(pickled(opened * 33 + b"N" + closed * 33)))
    assert refusal(file) == "is damaged or no PyTorch file (values nested more than 32 deep); download it again"


UNFIT = {
    "storage": (storage(4), "a value of the kind Storage"),
    "dtype": (number_type("u4"), "a value of the kind NumberType"),
    "array": (
        call(("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), several(number(0)), raw(b"b")),
        "a value of the kind Array",
    ),
    "no record": (tensor_of((1,), (1,), key="9" * 30), f"no 16 bytes of storage {'9' * 20})"),
    "short record": (tensor_of((1,), (1,), numel=5), "no 20 bytes of storage 0)"),
    "long record": (tensor_of((1,), (1,), numel=3), "no 12 bytes of storage 0)"),
    "no record of a byte": (tensor_of((1,), (1,), numel=1, key="9", kind="ByteStorage"), "no 1 bytes of storage 9)"),
    "no record of nothing": (tensor_of((0,), (1,), numel=0, key="9"), "no 0 bytes of storage 9)"),
}


@pytest.mark.parametrize("title", UNFIT)
def test_what_is_no_value(file: Path, title: str) -> None:
    value, words = UNFIT[title]
    file.write_bytes(archive(pickled(value), {"0": bytes(16)}))
    assert words in refusal(file) and refusal(file).startswith("is damaged or no PyTorch file (")


def test_tensors_take_twice_the_file_at_most(file: Path) -> None:
    """Several tensors may lie in one storage, as tied weights do."""
    numbers = bytes(range(256)) * 16

    def views(rest: int) -> bytes:
        sizes = (len(numbers), len(numbers), rest)
        parts = [tensor_of((size,), (1,), numel=len(numbers), kind="ByteStorage") for size in sizes]
        return archive(pickled(several(*parts)), {"0": numbers})

    rest = 2 * (len(views(1000)) - len(numbers))
    file.write_bytes(views(rest))
    assert rest < len(numbers) and 2 * file.stat().st_size == 2 * len(numbers) + rest
    found = read_pt(file, "key")["a"]
    assert [len(tensor) for tensor in found] == [4096, 4096, rest] and bytes(found[1].tolist()) == numbers
    file.write_bytes(views(rest + 1))
    assert "tensors that are larger than the file" in refusal(file)


def test_tensors_are_mapped_where_the_file_has_them(file: Path) -> None:
    """A model of many gigabytes is not read into memory first."""
    torch.save({"a": torch.rand(5), "b": torch.rand(7).double()}, file)
    found, records = read_pt(file, "key"), read_contents(file, verify=False).records
    starts = [start for start, _ in records.values()]
    assert found["b"].data_ptr() - found["a"].data_ptr() == starts[1] - starts[0]
    assert [tensor.untyped_storage().nbytes() for tensor in found.values()] == [20, 56]


def test_a_tensor_at_the_end_of_an_old_file(file: Path) -> None:
    torch.save({"a": torch.arange(3.0)}, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    assert whole.endswith(np.arange(3, dtype="<f4").tobytes()) and read_pt(file, "key")["a"].tolist() == [0, 1, 2]
    file.write_bytes(whole[:-1])
    assert "(no 12 bytes of storage" in refusal(file)


def test_messages(file: Path) -> None:
    assert refusal(file) == "does not exist or is no file; give the released .pt file or its folder"
    torch.save([1], file)
    assert refusal(file) == "holds a list, not a dictionary of weights"
    file.write_bytes(archive(pickled(name("os", "system"))))
    assert refusal(file).startswith("was refused: it asks to run os.system, and a file of weights has no need to")
    whole = archive(pickled(tensor_of((4,), (1,))), {"0": bytes(16)})
    at, size = whole.rindex(b"PK\1\2") + 20, struct.pack("<L", 300)
    file.write_bytes(whole[:at] + size + size + whole[at + 8 :])  # longer than the file
    reason = "EOFError|Overlapped entries: .+"  # an error without a text, or what newer Pythons say
    assert re.fullmatch(rf"is damaged or no PyTorch file \(({reason})\); download it again", refusal(file))


@pytest.mark.skipif(os.name != "posix", reason="users and modes of POSIX")
def test_a_file_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.pt"
        torch.save({"a": 1}, file)
        file.chmod(0)
        Path(folder).chmod(0o755)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # root may read everything
            assert refusal(file) == "may not be read; change its permissions or copy it"
        finally:
            os.seteuid(user)


def test_foreign_words_fit_into_a_line(tmp_path: Path) -> None:
    assert shown("a \n\t b\x1b[31m\u2028c") == "a b?[31m c"
    assert shown("x" * 161) == "x" * 160
    assert shown(" " * 319 + "x") == "x" and shown(" " * 320 + "x") == ""  # no more than twice the limit is looked at
    assert shown("a" + " " * 6 + "bc", limit=4) == "a b" and shown(12345, limit=4) == "1234"
    (tmp_path / "file").write_bytes(b"")
    names = ["file", ".", "missing", "zero\0", "x" * 5000, "file/inner"]
    assert [name for name in names if is_file(tmp_path / name)] == ["file"]
