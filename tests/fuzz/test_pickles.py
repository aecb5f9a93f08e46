"""Random pickles in archives with right checksums give plain values, or an error in one line.

Some are opcodes in random order, with plausible arguments more often than by chance; others are pickles of released
files with changed bytes or moved opcodes.
"""

from __future__ import annotations

import io
import pickletools
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.checkpoints.released import released_settings, save_vqvae
from cogview_pl.checkpoints.safe_pickle.load import read_pt
from cogview_pl.errors import UserError

from ..checkpoints.hostile import archive, name, number, raw, storage, tensor, text

pytestmark = pytest.mark.slow

SETTINGS = settings(max_examples=400, deadline=None, derandomize=True, database=None)
RECORDS = {"0": bytes(range(16)), "1": bytes(64)}

NAMES = [
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_nested_tensor"),
    ("torch", "FloatStorage"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("collections", "OrderedDict"),
    ("__builtin__", "set"),
    ("__builtin__", "bytearray"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("os", "system"),
]
INTEGERS = st.one_of(st.integers(0, 5), st.sampled_from([-1, 255, 2**31, 2**62, -(2**63), 2**63, 10**30]))
WORDS = st.sampled_from(["storage", "0", "1", "cpu", "a", "latin1", "u4", "O", "<", "b", "module", "é", "\n"])
FRAGMENTS = st.one_of(
    st.sampled_from(NAMES).map(lambda words: name(*words)),
    INTEGERS.map(number),
    WORDS.map(text),
    st.sampled_from([raw(b""), raw(b"abcd"), storage(4), tensor((2, 2), (2, 1)), b"]q\x00", b"}q\x01"]),
    st.integers(0, 3).map(lambda index: b"q%c" % index),
    st.integers(0, 3).map(lambda index: b"h%c" % index),
    st.sampled_from(
        [b"(", b"(", b"t", b"t", b"\x85", b"\x86", b"\x87", b"R", b"R", b"b", b"Q", b"N", b")", b"]", b"}"]
    ),
    st.sampled_from([b"a", b"e", b"s", b"u", b"\x88", b"\x89", b"."]),
    st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes]),
    st.binary(max_size=4),
    st.floats().map(lambda value: b"G" + struct.pack(">d", value)),
)
ASSEMBLED = st.lists(FRAGMENTS, max_size=40).map(lambda fragments: b"\x80\x02" + b"".join(fragments) + b".")


def check(pickle: bytes) -> None:
    """Read a file with this pickle; the result must be plain values, or an error in one line."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.pt"
        file.write_bytes(archive(pickle, RECORDS))
        try:
            check_value(read_pt(file, "some.key"), file.stat().st_size)
        except UserError as error:
            assert str(error).startswith("some.key: ") and "file.pt" in str(error) and str(error).isprintable()


def check_value(value: Any, size: int) -> None:
    assert type(value) in (dict, list, tuple, str, bytes, int, float, bool, type(None), torch.Tensor)
    if isinstance(value, torch.Tensor):
        assert value.layout == torch.strided and value.device.type == "cpu" and not value.requires_grad
        assert value.nbytes <= value.untyped_storage().nbytes() <= size
        value.sum()  # touches every number
    elif isinstance(value, dict):
        for part in (*value, *value.values()):
            check_value(part, size)
    elif isinstance(value, (list, tuple)):
        for part in value:
            check_value(part, size)


@SETTINGS
@given(pickle=ASSEMBLED)
def test_opcodes_in_any_order(pickle: bytes) -> None:
    check(pickle)


@SETTINGS
@given(value=st.lists(FRAGMENTS, max_size=12).map(b"".join))
def test_values_of_a_dictionary(value: bytes) -> None:
    check(b"\x80\x02}" + text("a") + value + b"s.")


def real_pickles(folder: Path) -> list[bytes]:
    """Pickles of an image tokenizer, and of training states besides weights."""
    save_vqvae(build_vqvae(released_settings(8, 4, 16)), folder / "tokenizer.pt")
    states = {"numpy": np.random.RandomState(0).get_state(), "steps": np.int64(3), "seen": {"x"}, "t": torch.ones(4)}
    torch.save({"module": torch.nn.Linear(2, 2).state_dict(), **states}, folder / "states.pt")
    found = []
    for file in ("tokenizer.pt", "states.pt"):
        with zipfile.ZipFile(io.BytesIO((folder / file).read_bytes())) as opened:
            found += [opened.read(record) for record in opened.namelist() if record.endswith("/data.pkl")]
    return found


@pytest.fixture(scope="module")
def reals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Pickles that `torch.save` wrote."""
    return real_pickles(tmp_path_factory.mktemp("real"))


@SETTINGS
@given(data=st.data())
def test_changed_bytes(reals: list[bytes], data: st.DataObject) -> None:
    pickle = bytearray(data.draw(st.sampled_from(reals)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(pickle) - 1))
        pickle[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b"(tRQbhq\x85\x86\x87).")))
    check(bytes(pickle))


@SETTINGS
@given(data=st.data())
def test_moved_opcodes(reals: list[bytes], data: st.DataObject) -> None:
    pickle = data.draw(st.sampled_from(reals))
    starts = [position for _, _, position in pickletools.genops(pickle)]
    parts = [pickle[start:end] for start, end in zip(starts, [*starts[1:], len(pickle)], strict=True)]
    for _ in range(data.draw(st.integers(1, 3))):
        source, target = (data.draw(st.integers(1, len(parts) - 1)) for _ in range(2))
        length = data.draw(st.integers(0, 3))
        moved = data.draw(st.one_of(st.just(parts[source : source + length]), FRAGMENTS.map(lambda part: [part])))
        parts[target : target + data.draw(st.integers(0, 2))] = moved
    check(b"".join(parts))
