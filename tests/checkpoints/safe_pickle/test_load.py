"""Foreign `.pt` files: nothing in them runs, crashes or allocates without bound, and damaged bytes are not believed."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogview_pl.checkpoints.safe_pickle.load import read_pt
from cogview_pl.errors import UserError

from ..hostile import (
    LITTLE_ENDIAN,
    TENSOR,
    archive,
    array,
    call,
    doubled,
    name,
    number,
    number_type,
    pickled,
    raw,
    several,
    storage,
    tensor,
    text,
)
from .values import assert_equal, contents

ROOT = Path(__file__).parents[3]
RECORDS = {"0": bytes(16), "1": bytes(4000)}
U4 = number_type("u4", *LITTLE_ENDIAN)


def address_as_object() -> bytes:
    """An array of one Python object whose address is in the file."""
    return call(("numpy", "ndarray"), several(number(1)), number_type("O"), raw(b"\x41" * 8))


HOLES: dict[str, tuple[bytes, str]] = {
    "array of objects": (address_as_object(), "anything but numbers"),
    "array by its class": (call(("numpy", "ndarray"), several(number(1)), U4, raw(bytes(4))), "run numpy.ndarray"),
    "array with state of objects": (array((1,), number_type("O"), b"]" + number(1) + b"a"), "anything but numbers"),
    "array of structures": (array((1,), number_type("V8", *LITTLE_ENDIAN), raw(bytes(8))), "anything but numbers"),
    "array of strings": (array((1,), number_type("U8", *LITTLE_ENDIAN), raw(bytes(32))), "anything but numbers"),
    "dtype with fields": (
        number_type("u4", *LITTLE_ENDIAN[:3], several(text("x")), b"}", *LITTLE_ENDIAN[5:]),
        "anything but numbers",
    ),
    "dtype with the flags of objects": (number_type("u4", *LITTLE_ENDIAN[:-1], number(63)), "anything but numbers"),
    "dtype without a byte order": (array((1,), number_type("u4"), raw(bytes(4))), "byte order"),
    "array longer than its bytes": (array((10**9,), U4, raw(bytes(4))), "bytes of a NumPy array"),
    "array of another class": (
        call(("numpy.core.multiarray", "_reconstruct"), name("numpy", "dtype"), several(number(0)), raw(b"b")),
        "another class",
    ),
    "array that is too long": (array((5000,), number_type("u1", *LITTLE_ENDIAN), raw(bytes(5000))), "more than 4096"),
    "array of empty lists": (array((2**40, 0), U4, raw(b"")), "more than 4096"),
    "array without a state": (
        call(("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), several(number(0)), raw(b"b")),
        "kind Array",
    ),
    "code": (call(("os", "system"), text("true")), "os.system"),
    "code by another name": (call(("builtins", "eval"), text("1")), "builtins.eval"),
    "function as a value": (name("builtins", "exec"), "builtins.exec"),
    "bytes of zeros": (call(("builtins", "bytearray"), number(10**11)), "builtins.bytearray"),
    "codec": (call(("_codecs", "encode"), text("a" * 99), text("idna")), "codec idna"),
    "empty tensor": (call(("torch", "Tensor"), number(10**11)), "torch.Tensor"),
    "storage by size": (call(("torch.storage", "UntypedStorage"), number(10**11)), "torch.storage.UntypedStorage"),
    "tensor type called": (call(("torch", "FloatStorage"), number(10**11)), "torch.FloatStorage"),
    "meta tensor": (
        call(
            ("torch._utils", "_rebuild_meta_tensor_no_storage"),
            *(name("torch", "float32"), several(number(10**12)), several(number(1)), b"\x89"),
        ),
        "_rebuild_meta_tensor_no_storage",
    ),
    "tensor of a class": (
        call(("torch._tensor", "_rebuild_from_type_v2"), name("torch", "device"), name("torch", "Tensor"), b")", b"}"),
        "_rebuild_from_type_v2",
    ),
    "quantized tensor": (call(("torch._utils", "_rebuild_qtensor")), "_rebuild_qtensor"),
    "sparse tensor": (call(("torch._utils", "_rebuild_sparse_tensor")), "_rebuild_sparse_tensor"),
    "nested tensor": (call(("torch._utils", "_rebuild_nested_tensor")), "_rebuild_nested_tensor"),
    "wrapped tensor": (call(("torch._utils", "_rebuild_wrapper_subclass")), "_rebuild_wrapper_subclass"),
    "tensor on a device": (call(("torch", "device"), text("meta")), "torch.device"),
    "stride of 0": (tensor((10**9, 10**6), (0, 0)), "in a storage of 4 numbers"),
    "longer than its storage": (tensor((5,), (1,)), "in a storage of 4 numbers"),
    "offset beyond its storage": (tensor((1,), (1,), offset=4), "in a storage of 4 numbers"),
    "stride beyond its storage": (tensor((2,), (2**62,)), "in a storage of 4 numbers"),
    "sizes that overflow": (tensor((2**32, 2**32), (1, 1)), "sizes of a tensor"),
    "size below 0": (tensor((-1,), (1,)), "sizes of a tensor"),
    "stride below 0": (tensor((2,), (-1,), offset=1), "sizes of a tensor"),
    "offset below 0": (tensor((1,), (1,), offset=-1), "arguments of a tensor"),
    "more sizes than strides": (tensor((1, 1), (1,)), "sizes of a tensor"),
    "too many dimensions": (tensor((1,) * 9, (1,) * 9), "sizes of a tensor"),
    "metadata": (
        call(TENSOR, storage(4), number(0), several(number(4)), several(number(1)), b"\x89", b"N", b"}K\x01K\x01s"),
        "arguments of a tensor",
    ),
    "storage longer than its record": (tensor((4,), (1,), numel=10**9), "bytes of storage 0"),
    "storage of another type": (tensor((4,), (1,), kind="DoubleStorage"), "bytes of storage 0"),
    "storage without a record": (tensor((4,), (1,), key="7"), "bytes of storage 7"),
    "storage outside of the folder": (tensor((4,), (1,), key="../version"), "bytes of storage"),
    "storage in two forms": (several(tensor((4,), (1,)), tensor((2,), (1,), numel=2)), "two forms"),
    "storage of an unknown type": (tensor((4,), (1,), kind="QInt8Storage"), "torch.QInt8Storage"),
    "storage for a tensor": (storage(4), "kind Storage"),
    "persistent object": (several(text("module"), text("x")) + b"Q", "no storage"),
    "one storage many times": (
        b"]" + b"(" + tensor((1000,), (1,), numel=1000, key="1") * 20 + b"e",
        "larger than the file",
    ),
    "many tensors": (
        name(*TENSOR)
        + b"q\x00"  # function and arguments are written once, each further call takes five bytes
        + several(storage(4), number(0), several(number(0)), several(number(1)))
        + b"q\x01"
        + b"]("
        + b"h\x00h\x01R" * 70_000
        + b"e",
        "more than 65536 tensors",
    ),
    "state of a tensor": (tensor((4,), (1,)) + b"}b", "state of a View"),
    "state of a function": (name("collections", "OrderedDict") + b"}b", "state of a Name"),
    "new object": (name("collections", "OrderedDict") + b")\x81", "NEWOBJ"),
    "deep key": (b"}" + b")" + b"\x85" * 1_000_000 + b"Ns", "a tuple as key"),
    "doubled key": (b"}" + doubled(60) + b"Ns", "a tuple as key"),
    "deep value": (b")" + b"\x85" * 1_000_000, "nested more than"),
    "list in itself": (b"]q\x00h\x00a", "nested more than"),
    "one text many times": (
        several(text("x" * 10**6), b"q\x00", *[call(("_codecs", "encode"), b"h\x00", text("latin1"))] * 20),
        "again and again",
    ),
    "other protocol": (b"\x80\x04N", "protocol 4"),
    "opcode for code": (b"(" + text("true") + b"ios\nsystem\n", "opcode INST"),
    "memory for one reference": (b"Nr\xff\xff\xff\xff\x8c\x01a", "SHORT_BINUNICODE"),
    "long pickle": (b"N" * (5 << 20), "too long"),
    "text beyond the end": (b"X\xff\xff\xff\xff", "damaged"),
    "number beyond the end": (b"\x8b\xff\xff\xff\x7f", "damaged"),
    "nothing": (b"", "damaged"),
}

_READ_ALL = """
import json, resource, sys
from pathlib import Path
from cogview_pl.checkpoints.safe_pickle.load import read_pt
from cogview_pl.errors import UserError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before, found = peak(), {}
for file in sorted(Path(sys.argv[1]).iterdir()):
    try:
        found[file.stem] = f"read: {type(read_pt(file, 'some.key'))}"
    except UserError as error:
        found[file.stem] = str(error)
print(json.dumps({"found": found, "megabytes": peak() - before}))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process of its own, which may crash, says of every hole."""
    folder = tmp_path_factory.mktemp("holes")
    for title, (value, _) in HOLES.items():
        (folder / f"{title}.pt").write_bytes(archive(pickled(value), RECORDS))
    command = [sys.executable, "-c", _READ_ALL, str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, (run.returncode, run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("title", HOLES)
def test_hole_is_closed(refusals: dict[str, Any], title: str) -> None:
    message = refusals["found"][title]
    assert message.startswith("some.key: ") and "\n" not in message
    _, reason = message.split(f"{title}.pt ")
    assert HOLES[title][1] in reason


def test_no_hole_takes_much_memory(refusals: dict[str, Any]) -> None:
    assert refusals["megabytes"] < 300


# --- what is in released files ---


def pickle_of(file: Path) -> bytes:
    with zipfile.ZipFile(file) as opened:
        (pickle,) = (record for record in opened.namelist() if record.endswith("/data.pkl"))
        return opened.read(pickle)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_states_of_random_generators(tmp_path: Path, module: bytes) -> None:
    state = np.random.RandomState(3).get_state()
    values = {"python": random.Random(3).getstate(), "numpy": state, "steps": np.int64(7), "rate": np.float64(0.5)}
    torch.save(values, tmp_path / "written.pt")
    pickle = pickle_of(tmp_path / "written.pt").replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "file.pt").write_bytes(archive(pickle.replace(b"numpy.core.multiarray", module)))
    found = read_pt(tmp_path / "file.pt", "key")
    assert found == values | {"numpy": (state[0], state[1].tolist(), *state[2:])}
    assert type(found["steps"]) is int and type(found["rate"]) is float


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("code", ["b1", "i1", "u2", ">i4", "u8", "f2", ">f8"])
def test_arrays_become_lists(tmp_path: Path, code: str, order: Any) -> None:
    value = np.asarray(np.arange(6).reshape(2, 3) % 2, dtype=code, order=order)
    torch.save({"matrix": value, "empty": value[:0], "number": np.asarray(value[0, 1])}, tmp_path / "file.pt")
    found = read_pt(tmp_path / "file.pt", "key")
    assert found == {"matrix": value.tolist(), "empty": [], "number": value[0, 1].item()}


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_values(tmp_path: Path, caplog: pytest.LogCaptureFixture, zipped: bool) -> None:
    torch.manual_seed(0)
    wanted = contents()
    torch.save(wanted, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    with caplog.at_level(logging.WARNING):
        assert_equal(read_pt(tmp_path / "file.pt", "key"), wanted)
    warnings = [record.message for record in caplog.records]
    assert warnings == [] if zipped else ("file.pt" in warnings[0] and "no checksums" in warnings[0])
    assert len(warnings) == (not zipped)


def test_text_and_dictionaries_of_python_2(tmp_path: Path) -> None:
    """The weights of LPIPS were saved by it: short strings, and an OrderedDict with its entries as a list of pairs."""
    pair = b"](U\x05lin0wK\x07e"
    given = b"\x80\x02" + call(("collections", "OrderedDict"), b"](" + pair + b"e") + b"."
    (tmp_path / "file.pt").write_bytes(archive(given))
    assert read_pt(tmp_path / "file.pt", "key") == {"lin0w": 7}
    (tmp_path / "file.pt").write_bytes(archive(given.replace(pair, b"](])K\x07e")))
    with pytest.raises(UserError, match="entries of a dictionary"):
        read_pt(tmp_path / "file.pt", "key")


def test_what_occurs_twice_is_made_once(tmp_path: Path) -> None:
    table = torch.zeros(4, 2)
    torch.save({"table": table, "output": table, "views": [table[0], table[0]]}, tmp_path / "file.pt")
    found = read_pt(tmp_path / "file.pt", "key")
    assert found["table"] is found["output"]
    assert found["views"][0].data_ptr() == found["views"][1].data_ptr() == found["table"].data_ptr()
    (tmp_path / "file.pt").write_bytes(archive(pickled(doubled(28))))
    assert len(read_pt(tmp_path / "file.pt", "key")["a"]) == 2


def test_what_is_written_into_tensors_stays_in_memory(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "file.pt")
    before = (tmp_path / "file.pt").read_bytes()
    read_pt(tmp_path / "file.pt", "key")["a"].add_(1)
    assert (tmp_path / "file.pt").read_bytes() == before


def test_unaligned_storage(tmp_path: Path) -> None:
    data = np.arange(4, dtype="<f4").tobytes()
    files = [archive(pickled(tensor((4,), (1,))) + bytes(shift), {"0": data}) for shift in range(4)]
    for content in files:  # bytes behind the end of the pickle move the record that follows
        (tmp_path / "file.pt").write_bytes(content)
        found = read_pt(tmp_path / "file.pt", "key")["a"]
        assert found.tolist() == [0, 1, 2, 3] and found.data_ptr() % 4 == 0


# --- damage ---
