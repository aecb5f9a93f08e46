"""Any input of a user or a disk gives a result, or an error in one line; 2,800 cases, always the same ones.

Everything runs in this process, and calls the functions that read values of the configuration, prompts, caption
files and lists of images, headers of token stores, layouts.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogview_pl.assembly.prompts import read_prompts
from cogview_pl.cli.messages import _of_composition
from cogview_pl.cli.overrides import quote_override
from cogview_pl.config.limits import check_limits
from cogview_pl.config.schema import register_schemas
from cogview_pl.data.decoding.decode import SampleError
from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.image_folders.layout import LISTINGS as CAPTION_FILES
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.data.webdataset import ShardDataset
from cogview_pl.errors import UserError
from cogview_pl.runs.image_files import read_pairs
from cogview_pl.vocab import Template, TextTokenizer, Vocabulary

from ..texts import learned_text

pytestmark = pytest.mark.slow

SHARED = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # including lone surrogates
NUMBERS = st.one_of(
    st.integers(), st.integers(-3, 5), st.floats(), st.sampled_from([10**400, -(10**30), 2**63, 0.5, 1e308])
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, ANY_TEXT)
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)


OF_COMPOSING = (HydraException, OmegaConfBaseException, OverflowError)
"""Exceptions of composing that `main` turns into one line."""


@contextmanager
def one_line_at_most(*more: type[Exception]) -> Iterator[None]:
    """Call a function; it must return a result, or raise an error in one line."""
    try:
        yield
    except (UserError, *more) as error:
        message = _of_composition(error) if isinstance(error, OF_COMPOSING) else str(error)
        assert message.strip()
        assert "Traceback" not in message


# --- values of the configuration ---


@pytest.fixture(scope="module")
def configurations() -> dict[str, DictConfig]:
    """Composed configurations of several tasks."""
    register_schemas()
    found = {}
    with hydra.initialize(version_base="1.3", config_path="../../conf"):
        for task in ("vqvae", "tokenize", "pretrain", "generate"):
            found[task] = hydra.compose("config", overrides=[f"task={task}"])
    return found


def keys(node: DictConfig, prefix: str = "") -> list[str]:
    """Paths of all values."""
    found = []
    for name in node:
        path = f"{prefix}{name}"
        child = node._get_node(name)
        found += keys(child, f"{path}.") if isinstance(child, DictConfig) and not child._is_none() else [path]
    return found


@contextmanager
def unchanged(config: DictConfig, key: str) -> Iterator[None]:
    """Restore the group of a key; copying the full configuration for each case would take minutes."""
    group = key.split(".")[0]
    before = copy.deepcopy(config._get_node(group))
    try:
        yield
    finally:
        config._content[group] = before


@settings(max_examples=800, **SHARED)
@given(data=st.data())
def test_values_of_the_configuration(configurations: dict[str, DictConfig], data: st.DataObject) -> None:
    config = configurations[data.draw(st.sampled_from(sorted(configurations)))]
    key = data.draw(st.sampled_from(keys(config)))
    value = data.draw(st.one_of(PLAIN.map(str), ANY_TEXT, TREES.map(lambda tree: json.dumps(tree, default=str))))
    with unchanged(config, key), one_line_at_most(*OF_COMPOSING):
        overrides = OverridesParser.create().parse_overrides([quote_override(f"{key}={value}")])
        if overrides[0].is_sweep_override():
            return
        ConfigLoaderImpl._apply_overrides_to_config(overrides, config)
        check_limits(config)
        OmegaConf.to_object(config)


@settings(max_examples=200, **SHARED)
@given(key=st.data(), value=st.one_of(NUMBERS, st.booleans()))
def test_numbers_of_the_configuration(configurations: dict[str, DictConfig], key: st.DataObject, value: float) -> None:
    """Values outside the grammar of the command line come from files."""
    config = configurations["pretrain"]
    name = key.draw(st.sampled_from(keys(config)))
    with unchanged(config, name), one_line_at_most(*OF_COMPOSING):
        OmegaConf.update(config, name, value)
        check_limits(config)


# --- prompts ---


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return learned_text(["左上角有一个大的红色圆形", "a small blue heart"] * 20, vocab_size=330)


@settings(max_examples=300, **SHARED)
@given(given=st.one_of(TREES, st.lists(ANY_TEXT, max_size=4)))
def test_prompts_as_values(text: TextTokenizer, given: Any) -> None:
    with one_line_at_most():
        require_prompts(text, given)


@settings(max_examples=200, **SHARED)
@given(content=st.one_of(st.binary(max_size=200), ANY_TEXT.map(lambda t: t.encode("utf-8", "surrogatepass"))))
@example(b"\xff\xfe")
@example("红色".encode("gbk"))
def test_prompts_in_files(text: TextTokenizer, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with one_line_at_most():
        require_prompts(text, str(file))


def require_prompts(text: TextTokenizer, given: object) -> None:
    """Read and tokenise prompts, and lay out accepted prompts by the template."""
    if given is None or given == "-":
        return
    vocabulary = Vocabulary(codebook_size=16, text_vocab_size=text.vocab_size)
    template = Template(
        "[ROI1] {text} [BASE] [BOI1] {image:2x2}", target="image", loss={}, vocabulary=vocabulary, text_length=12
    )
    for prompt in read_prompts(given):
        tokens = template.prompt({"text": text.encode(prompt)})
        assert all(0 <= token < vocabulary.size for token in tokens)


# --- caption files ---

FIELD_NAMES = st.one_of(st.sampled_from(["file_name", "image", "path", "text", "caption", "style"]), ANY_TEXT)
RECORDS = st.one_of(st.dictionaries(FIELD_NAMES, st.one_of(st.just("a.png"), TREES), max_size=4), TREES)


def as_lines(records: list[Any]) -> bytes:
    return "\n".join(json.dumps(record) for record in records).encode()


LISTINGS = st.one_of(
    st.lists(RECORDS, max_size=4).map(as_lines),
    st.binary(max_size=200),
    ANY_TEXT.map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.lists(st.text(st.sampled_from('file_name,text\t"\n a.png红'), max_size=40), max_size=4).map(
        lambda rows: ("file_name,text\n" + "\n".join(rows)).encode()
    ),
)
DEEP = b"[" * 200_000


@settings(max_examples=500, **SHARED)
@given(name=st.sampled_from([*CAPTION_FILES, "a.txt"]), content=LISTINGS, field=st.one_of(st.none(), FIELD_NAMES))
@example("captions.jsonl", DEEP, None)
@example("captions.jsonl", as_lines([{"file_name": "a.png" * 100, "text": "t"}]), None)
@example("captions.jsonl", as_lines([{"file_name": "a\0.png", "text": "t"}]), None)
@example(
    "captions.jsonl", as_lines([{"file_name": "../" * 2000, "text": "t"}, {"file_name": "a.png", "text": "t"}]), None
)
@example("captions.csv", b"file_name,text\n" + b'a.png,"' + b"x" * 200_000, None)
def test_caption_files(name: str, content: bytes, field: str | None) -> None:
    with tempfile.TemporaryDirectory() as root, one_line_at_most():
        (Path(root) / "a.png").write_bytes(PNG)
        (Path(root) / name).write_bytes(content)
        dataset = FolderDataset(root, "train", 8, 0.0, field)
        for index in range(min(3, len(dataset))):
            assert isinstance(dataset[index], (ImageSample, Skipped))


@settings(max_examples=150, **SHARED)
@given(content=LISTINGS)
@example(DEEP)
def test_lists_of_pairs(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(content)
    with one_line_at_most():
        assert all(set(pair) == {"prompt", "file"} for pair in read_pairs(file))


@settings(max_examples=150, **SHARED)
@given(note=LISTINGS, image=st.one_of(st.just(b""), st.binary(max_size=100)), places=st.lists(st.integers(0, 5000)))
@example(DEEP, b"", [])
def test_shards(shard: Callable[..., Path], note: bytes, image: bytes, places: list[int]) -> None:
    """Any .json next to any image, and shards with flipped bits."""
    file = shard({"a.png": PNG, "a.json": b'{"text": "t"}', "b.png": PNG + image, "b.json": note})
    data = bytearray(file.read_bytes())
    for place in places:
        data[place % len(data)] ^= 1 << place % 8
    file.write_bytes(data)
    with one_line_at_most():
        dataset = ShardDataset(str(file), "train", 8, 0.0, "text")
        for index in range(len(dataset)):
            assert isinstance(dataset[index], (ImageSample, Skipped))


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Path]:
    import io
    import tarfile

    def write(members: dict[str, bytes]) -> Path:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return tmp_path / "a.tar"

    return write


def png() -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    return stream.getvalue()


PNG = png()


# --- token stores ---


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished token store with three rows."""
    folder = tmp_path_factory.mktemp("fuzz") / "token_store"
    sizes: dict[str, Any] = {"text_length": 4, "grid": (2, 2), "text_vocab_size": 50, "codebook_size": 8}
    writer = TokenStoreWriter(folder, **sizes, text_tokenizer="t", image_tokenizer="i", splits={"train": 3})
    writer.append("train", {"text": [[1], [2, 3], []]}, torch.zeros(3, 2, 2, dtype=torch.long), ["a", "b", "c"], 3)
    writer.finish()
    return folder


@settings(max_examples=400, **SHARED)
@given(data=st.data())
def test_headers_of_stores(store: Path, data: st.DataObject) -> None:
    """Any bytes, and headers of earlier versions (without checksum) with any values."""
    file = store / "header.json"
    whole = file.read_bytes()
    header = json.loads(whole)
    del header["crc32"], header["checksums"]
    kind = data.draw(st.sampled_from(["value", "split", "bytes", "flips"]))
    if kind == "value":
        header[data.draw(st.sampled_from([*header, "other"]))] = data.draw(TREES)
    elif kind == "split":
        header["splits"]["train"][data.draw(st.sampled_from([*header["splits"]["train"], "x"]))] = data.draw(TREES)
    content = bytearray(json.dumps(header).encode())
    if kind == "bytes":
        content = bytearray(data.draw(st.binary(max_size=100)))
    elif kind == "flips":
        content = bytearray(whole)
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3, unique=True)):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        file.write_bytes(content)
        with one_line_at_most():
            opened = TokenStore.open(store)
            rows = opened.split("train")
            for index in range(min(len(rows), 4)):
                text_tokens, codes = rows[index]
                assert set(text_tokens) == set(opened.header.text_fields) and codes.shape == opened.header.grid
            assert kind != "flips" or json.loads(content) == json.loads(whole), "a damaged header was believed"
    finally:
        file.write_bytes(whole)


# --- layouts ---

WORDS = st.one_of(
    st.sampled_from(["[ROI1]", "[BASE]", "[BOI1]", "{text}", "{image:2x2}", "{image:0x0}", "{x:99999999999x1}"]),
    ANY_TEXT,
)


@settings(max_examples=100, **SHARED)
@given(words=st.lists(WORDS, max_size=6), target=st.one_of(st.just("image"), st.just("text"), ANY_TEXT))
def test_layouts(words: list[str], target: str) -> None:
    with one_line_at_most(SampleError):
        template = Template(
            " ".join(words),
            target=target,
            loss={},
            vocabulary=Vocabulary(codebook_size=8, text_vocab_size=30),
            text_length=4,
        )
        assert template.length > 0
