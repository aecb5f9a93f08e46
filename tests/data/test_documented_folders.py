"""The examples of the tables in docs/data.md, run as they stand there."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.samples import ImageSample

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading, without its header."""
    _, _, rest = PAGE.partition(f"\n{heading}\n")
    assert rest, heading
    lines = next(part for part in rest.split("\n\n") if part.startswith("|")).splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    return stream.getvalue()


class TestFolders:
    """Each layout of a folder gives the keys and captions of its row."""

    ROWS = table("### Folders")

    @pytest.mark.parametrize(("layout", "keys", "files", "samples"), ROWS, ids=[row[0] for row in ROWS])
    def test_layout(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, keys: str, files: str, samples: str
    ) -> None:
        for line in files.split("<br>"):
            self._write(tmp_path, line)
        dataset = FolderDataset(split="train", image_size=8, val_fraction=0.0, **self._options(tmp_path, keys))
        found = [dataset[index] for index in range(len(dataset))]
        assert all(isinstance(sample, ImageSample) and sample.image[0].min() == 255 for sample in found), layout
        assert [f"`{sample.key}` {sample.text}" for sample in found] == samples.split("<br>")  # type: ignore[union-attr]

    @staticmethod
    def _write(root: Path, line: str) -> None:
        """Make the file of a line `FILE`, or add the text of a line `FILE: TEXT` to it."""
        name, _, text = line.strip("`").partition(": ")
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            file.write_bytes(png())
        else:
            text = text.replace("⇥", "\t").replace("BASE64", base64.urlsafe_b64encode(png()).decode())
            with file.open("a", encoding="utf-8") as stream:
                stream.write(f"{text}\n")

    @staticmethod
    def _options(root: Path, keys: str) -> dict[str, object]:
        options: dict[str, object] = {"root": root}
        for word in keys.strip("`").split():
            key, _, value = word.removeprefix("data.").partition("=")
            options[key] = None if value == "null" else value
        if isinstance(styles := options.get("styles"), str):
            pairs = (pair.split(":") for pair in styles.strip("{}").split(","))
            options["styles"] = {style: folder.replace("DIR", str(root)) for style, folder in pairs}
        return options
