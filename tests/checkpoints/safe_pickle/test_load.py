"""Foreign `.pt` files: nothing in them runs, crashes or allocates without bound, and damaged bytes are not believed."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.checkpoints.released import released_settings, save_transformer, save_vqvae
from cogview_pl.checkpoints.safe_pickle.load import read_pt
from cogview_pl.errors import UserError
from tests.make_models import make_transformer

from ..hostile import (
    LITTLE_ENDIAN,
    TENSOR,
    archive,
    array,
    call,
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

ROOT = Path(__file__).parents[3]
RECORDS = {"0": bytes(16), "1": bytes(4000)}
U4 = number_type("u4", *LITTLE_ENDIAN)


def address_as_object() -> bytes:
    """An array of one Python object whose address is in the file."""
    return call(("numpy", "ndarray"), several(number(1)), number_type("O"), raw(b"\x41" * 8))


def doubled(levels: int) -> bytes:
    """A tuple of two tuples, which are the same one, and so on: short to write, without end to walk through."""
    return b")" + b"".join(b"q%ch%c\x86" % (level, level) for level in range(levels))


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


def contents() -> dict[str, Any]:
    """Tensors of all kinds, and what programs save beside them."""
    base = torch.randn(6, 4)
    module = torch.nn.Linear(2, 3)
    return {
        "module": module.state_dict(),  # an OrderedDict with an attribute
        "parameter": module.weight,
        "transposed": base.T,
        "part": base[2:5, 1],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "long": torch.arange(5),
        "small": torch.arange(3, dtype=torch.int8),
        "bytes": torch.get_rng_state()[:7],
        "bool": torch.tensor([True, False]),
        "texts": ["Ω", "", b"\xff\x00", b""],
        "numbers": (1, -5, 2**40, True, None, 1.5),
        "shape": torch.Size([2, 3]),
        "set": {"x"},
        3: {"type": torch.float16},
    }


def assert_equal(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert type(found) is torch.Tensor and found.dtype == wanted.dtype and torch.equal(found, wanted)
        assert not found.requires_grad and found.device.type == "cpu"
    elif isinstance(wanted, dict):
        assert type(found) is dict and list(found) == list(wanted)
        for key, value in wanted.items():
            assert_equal(found[key], value)
    elif isinstance(wanted, torch.dtype):
        assert found == str(wanted)
    else:
        assert found == (sorted(wanted) if isinstance(wanted, set) else wanted)


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


def released_transformer(folder: Path) -> Path:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "num_positions": 8}
    save_transformer(make_transformer(vocab_size=64, **sizes), folder)
    return folder / "1" / "mp_rank_00_model_states.pt"


def released_tokenizer(folder: Path) -> Path:
    save_vqvae(build_vqvae(released_settings(8, 4, 16)), folder / "tokenizer.pt")
    return folder / "tokenizer.pt"


WRITERS = [released_transformer, released_tokenizer]


@pytest.mark.parametrize("write", WRITERS)
def test_flipped_bits_are_not_believed(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    torch.manual_seed(0)
    file = write(tmp_path)
    whole = file.read_bytes()
    (tmp_path / "whole.pt").write_bytes(whole)
    wanted = read_pt(tmp_path / "whole.pt", "key")
    flips = random.Random(0).sample(range(8 * len(whole)), 100)
    refused = 0
    for flip in flips:
        damaged = bytearray(whole)
        damaged[flip // 8] ^= 1 << flip % 8
        file.write_bytes(damaged)
        try:
            assert_equal(read_pt(file, "key"), wanted)
        except UserError as error:
            assert str(error).startswith("key: ") and file.name in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 50  # most bits are weights


@pytest.mark.parametrize("write", WRITERS)
def test_flips_around_the_records(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """Headers, padding and directory have no checksums: whatever is read must be right all the same."""
    torch.manual_seed(0)
    file = write(tmp_path)
    whole = file.read_bytes()
    (tmp_path / "whole.pt").write_bytes(whole)
    wanted = read_pt(tmp_path / "whole.pt", "key")
    headers = [at for at in range(len(whole)) if whole[at : at + 2] == b"PK"]
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[min(rng.choice(headers) + rng.randrange(80), len(whole) - 1)] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            assert_equal(read_pt(file, "key"), wanted)
        except UserError as error:
            assert str(error).startswith("key: ") and "\n" not in str(error)


def test_checksums_can_be_left_out(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "file.pt")
    damaged = bytearray((tmp_path / "file.pt").read_bytes())
    damaged[damaged.index(bytes(4000)) + 2000] ^= 1
    (tmp_path / "file.pt").write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged.*CRC"):
        read_pt(tmp_path / "file.pt", "key")
    assert read_pt(tmp_path / "file.pt", "key", verify=False)["a"].count_nonzero() == 1


def flip_start(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def compressed(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.namelist():
            new.writestr(record, old.read(record))
    return stream.getvalue()


def other_machine(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        names = [record for record in opened.namelist() if "byteorder" not in record]
        parts = {record: opened.read(record) for record in names}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as new:
        for record, part in {**parts, f"{names[0].split('/')[0]}/byteorder": b"big"}.items():
            new.writestr(record, part)
    return stream.getvalue()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut at the end": lambda data: data[:-30],
    "cut in half": lambda data: data[: len(data) // 2],
    "cut at the start": lambda data: data[100:],
    "first letter": flip_start,
    "no end record": lambda data: data[:-22] + bytes(22),
    "empty": lambda data: b"",
    "text": lambda data: b"<html>404</html>" * 100,
    "compressed": compressed,
    "other machine": other_machine,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_archives(tmp_path: Path, damage: str) -> None:
    whole = released_tokenizer(tmp_path).read_bytes()
    (tmp_path / "file.pt").write_bytes(DAMAGE[damage](whole))
    for verify in (True, False):
        with pytest.raises(UserError, match=r"key: .*file.pt is damaged or no PyTorch file \(.+\); download it again"):
            read_pt(tmp_path / "file.pt", "key", verify=verify)


def written(*records: tuple[str, bytes, int]) -> bytes:
    """An archive of records: name, content, and zipfile's number of how they are compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for record, data, compression in records:
            file.writestr(zipfile.ZipInfo(record), data, compression)
    return stream.getvalue()


PICKLE = ("archive/data.pkl", pickled(tensor((4,), (1,))), zipfile.ZIP_STORED)


def overlapping() -> bytes:
    """A record that holds another one."""
    inner, data = zipfile.ZipInfo("archive/data/1"), bytes(1 << 16)
    inner.file_size, inner.compress_size, inner.CRC = len(data), len(data), zlib.crc32(data)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(*PICKLE[:2])
        file.writestr("archive/data/0", inner.FileHeader() + data)
        inner.header_offset = stream.tell() - len(data) - len(inner.FileHeader())
        file.filelist.append(inner)
    return stream.getvalue()


def compressed_to_its_length() -> bytes:
    """A record whose compressed bytes are as many as its own."""
    for length in range(4, 40, 4):
        for period in range(1, 9):
            data = bytes(at % period for at in range(length))
            content = written(PICKLE, ("archive/data/0", data, zipfile.ZIP_DEFLATED))
            record = zipfile.ZipFile(io.BytesIO(content)).getinfo("archive/data/0")
            if record.compress_size == length:
                return content
    raise AssertionError("no such record was found")


def twice(record: str) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return written(PICKLE, (record, *PICKLE[1:]))


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "overlapping": (overlapping, "verlap"),
    "compressed to its length": (compressed_to_its_length, "compressed record archive/data/0"),
    "two of one name": (lambda: twice(PICKLE[0]), "two records of one name"),
    "two pickles": (lambda: twice("other/data.pkl"), "2 records data.pkl"),
    "no pickle": (lambda: written(("archive/version", b"3", zipfile.ZIP_STORED)), "0 records data.pkl"),
    "large directory": (
        lambda: bytes(20 << 20) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 20 << 20, 0, 0),
        f"a directory of {20 << 20} bytes",
    ),
}


@pytest.mark.parametrize("title", ARCHIVES)
def test_archives_that_torch_does_not_write(tmp_path: Path, title: str) -> None:
    write, words = ARCHIVES[title]
    (tmp_path / "file.pt").write_bytes(write())
    for verify in (True, False):
        with pytest.raises(UserError, match=f"file.pt is damaged or no PyTorch file .*{words}"):
            read_pt(tmp_path / "file.pt", "key", verify=verify)


OLD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "version": (lambda data: data.replace(b"M\xe9\x03", b"M\xe8\x03", 1), "another version"),
    "byte order": (lambda data: data.replace(b"\x88", b"\x89", 1), "byte order"),
    "length": (lambda data: data[:-32] + bytes([9]) + data[-31:], "of another length"),
    "cut": (lambda data: data[:-4], "no 24 bytes of storage"),
    "cut before the length": (lambda data: data[:-30], "buffer of 8 bytes"),
    "end of an archive": (lambda data: data + b"PK\5\6" + bytes(18), "0 records data.pkl"),
}


@pytest.mark.parametrize("change", OLD)
def test_old_files_that_torch_does_not_write(tmp_path: Path, change: str) -> None:
    edit, words = OLD[change]
    torch.save({"a": torch.arange(3)}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "file.pt").write_bytes(edit((tmp_path / "file.pt").read_bytes()))
    with pytest.raises(UserError, match=f"file.pt is damaged or no PyTorch file .*{words}"):
        read_pt(tmp_path / "file.pt", "key")


def test_old_files_end_in_a_result_or_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save(contents(), file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged[: rng.choice([len(whole), rng.randrange(len(whole))])])
        try:
            assert isinstance(read_pt(file, "key"), dict)
        except UserError as error:
            assert str(error).startswith("key: ") and "\n" not in str(error)


def test_code_in_old_files(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path}/was_here",)

    torch.save({"a": Hostile()}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"refused.*system"):
        read_pt(tmp_path / "file.pt", "key")
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("keys", [several(text("0")), b"]" + doubled(60) + b"a", b"]", b"](" + text("0") * 2 + b"e"])
def test_list_of_storages_in_old_files(tmp_path: Path, keys: bytes) -> None:
    torch.save({}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    start = (tmp_path / "file.pt").read_bytes().removesuffix(b"\x80\x02}q\x00.\x80\x02]q\x00.")
    parts = [pickled(tensor((4,), (1,))), b"\x80\x02" + keys + b".", number(4)[2:].ljust(8, b"\0"), bytes(16)]
    (tmp_path / "file.pt").write_bytes(start + b"".join(parts))
    with pytest.raises(UserError, match="list of storages"):
        read_pt(tmp_path / "file.pt", "key")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    for path in ("pipe.pt", "folder.pt", "missing.pt", "x" * 5000 + ".pt", "zero\0.pt"):
        with pytest.raises(UserError, match=r"key: .* does not exist or is no file"):
            read_pt(tmp_path / path, "key")
