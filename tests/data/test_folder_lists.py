"""Lists of captions in a folder: which one counts, which fields, and what is wrong in which line."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from PIL import Image

from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.image_folders.listed import Listed
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS, Stopped

from .image_folders import listed

UNREADABLE = Path("/proc/self/mem")
"""A file that is there and may be opened, of which the system reads nothing."""
needs_unreadable = pytest.mark.skipif(not UNREADABLE.exists(), reason="needs a file whose beginning no one can read")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a.png and b.png."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def refused(root: Path, **options: str) -> str:
    with pytest.raises(UserError) as error:
        listed(root, **options)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{root}/", "")


def test_the_first_of_several_lists_counts(root: Path) -> None:
    (root / "a.txt").write_text("beside")
    assert listed(root) == [Listed("a.png", ("beside",)), Listed("b.png")]
    for name in reversed(
        ("metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.csv", "metadata.tsv", "captions.tsv")
    ):
        separator = {"csv": ",", "tsv": "\t"}.get(name[-3:])
        rows = f'{{"path": "a.png", "text": "{name}"}}'
        (root / name).write_text(rows if separator is None else f"path,text\na.png,{name}".replace(",", separator))
        assert listed(root) == [Listed("a.png", (name,))]


def test_the_first_of_several_fields_counts(root: Path) -> None:
    (root / "captions.csv").write_text("caption,path,text,image,file_name\n1,2,3,4,a.png\n")
    assert listed(root) == [Listed("a.png", ("3",))]
    assert listed(root, caption="caption", style="image") == [Listed("a.png", ("1",), style="4")]
    (root / "captions.csv").write_text("caption,path,image\n1,2,a.png\n")
    assert listed(root) == [Listed("a.png", ("1",))]


def test_an_empty_text_file_is_a_caption_that_is_empty(root: Path) -> None:
    (root / "a.txt").touch()
    assert listed(root) == [Listed("a.png"), Listed("b.png")]


def test_a_folder_may_be_named_from_home(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "a.txt").write_text("t")
    monkeypatch.setenv("HOME", str(root.parent))
    for places in ({"root": f"~/{root.name}"}, {"root": None, "styles": {"油画": f"~/{root.name}"}}):
        dataset = FolderDataset(split="train", image_size=4, val_fraction=0.0, **places)  # type: ignore[arg-type]
        assert dataset[0].key == ("油画/a.png" if "styles" in places else "a.png")
        assert dataset[0].image.shape == (3, 4, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("captions.jsonl", '\n\n{"path": ""}', "captions.jsonl:3 names no image; use file_name or"),
        ("captions.jsonl", '{"path": ["a.png"]}', "captions.jsonl:1 names no image; use"),
        ("captions.jsonl", "{}", "captions.jsonl:1 names no image; use file_name or image or path (fields here: n"),
        ("captions.jsonl", "[" * 10**5, "captions.jsonl:1 is not JSON (maximum recursion depth"),
        ("captions.jsonl", '{"path": "a.png", "text": 1, "caption": "t"}', "captions.jsonl:1, text: the caption is"),
        ("captions.csv", 'path,text\nb.png\n', "captions.csv:2 has 1 columns, the header has 2; put"),
        ("captions.csv", 'path,text\n\n\na.png,"1"2\n', "captions.csv:4 is malformed ("),
        ("captions.csv", "path,text\n\n\n", "captions.csv lists no images; give one per line"),
        ("captions.tsv", "title,text\nred,t\n", "captions.tsv:2 names no image; use file_name or image or path"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_which_line(root: Path, name: str, content: str, reason: str) -> None:
    (root / name).write_text(content)
    assert refused(root).startswith(reason)


def test_a_style_that_is_no_text_is_named_with_its_field(root: Path) -> None:
    (root / "captions.jsonl").write_text('{"path": "a.png", "text": "t", "medium": 3}')
    assert refused(root, style="medium") == (
        "captions.jsonl:1, medium: the style is not text but 3; mend the line or set data.style_field"
    )


@needs_unreadable
def test_what_the_system_does_not_read_is_named(root: Path) -> None:
    (root / "b.txt").symlink_to(UNREADABLE)
    assert refused(root) == "b.txt cannot be read (Input/output error); mend or remove it"
    (root / "captions.csv").symlink_to(UNREADABLE)
    assert refused(root) == "captions.csv cannot be read (Input/output error); see to it"


def test_of_several_images_the_first_that_is_there_but_no_file_is_named(root: Path) -> None:
    for name in ("c.png", "d.png"):
        (root / name).mkdir()
    (root / "captions.csv").write_text("path,text\ngone.png,t\nc.png,t\nd.png,t\n")
    assert refused(root) == ("captions.csv: none of the 3 listed images can be read; c.png is a folder, not a file")
    (root / "captions.csv").write_text("path,text\nc.png,t\ngone.png,t\nb.png,t\n")
    assert [image.file for image in listed(root)] == ["c.png", "gone.png", "b.png"]


@pytest.mark.parametrize("styles", [["a"], "a", {"油画": 3}])
def test_styles_are_folders_by_name(styles: object) -> None:
    with pytest.raises(
        UserError, match=r"^data\.styles=.*: give one folder per style, as in \{油画: DIR, 素描: DIR\}$"
    ):
        FolderDataset(None, "train", 4, 0.0, styles=styles)  # type: ignore[arg-type]


def test_the_style_of_a_folder_counts_whatever_its_list_says(root: Path) -> None:
    (root / "captions.csv").write_text("path,text,medium\na.png,t,素描\nb.png,u,油画\n")
    named = FolderDataset(None, "train", 4, 0.0, styles={"水墨": root}, style_patterns=["{style}:{text}"])
    assert named.texts() == ["水墨:t", "水墨:u"]
    listed = FolderDataset(root, "train", 4, 0.0, style_field="medium", style_patterns=["{style}:{text}"])
    assert listed.texts() == ["素描:t", "油画:u"]


def test_a_stop_that_is_asked_for_ends_each_pass_over_the_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "a.txt").write_text("t")
    dataset = FolderDataset(root, "train", 4, 0.0)
    with monkeypatch.context() as asked:
        asked.setattr(SIGNALS, "received", signal.SIGTERM)
        with pytest.raises(Stopped):
            dataset.fingerprint()
        with pytest.raises(Stopped):
            listed(root)
        (root / "captions.csv").write_text("path,text\na.png,t\n")
        with pytest.raises(Stopped):
            listed(root)
    assert listed(root) == [Listed("a.png", ("t",))]
