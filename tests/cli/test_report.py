"""`report.html` of a chain is complete and self-contained, and agrees with the run folders."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2.functional import to_pil_image

from cogview_pl.runs.report.page import Stage, write_report

VOID = {"meta", "img", "br"}
SHEETS = ("reconstructions.png", "samples/grid.png")


@dataclass
class Element:
    """An element of the page; `words` is its own text without the text of its children."""

    tag: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    words: str = ""

    def all(self, tag: str) -> list[Element]:
        """Elements of this name below, in order."""
        return [found for child in self.children for found in ([child] * (child.tag == tag) + child.all(tag))]

    @property
    def text(self) -> str:
        """All text, at any depth."""
        return self.words + "".join(child.text for child in self.children)

    def of_class(self, name: str) -> list[Element]:
        """Elements with this `class` below."""
        below = [[child, *child.of_class(name)] for child in self.children]
        return [found for group in below for found in group if name in found.attributes.get("class", "").split()]


class Reader(HTMLParser):
    """Reads a page into elements and refuses tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("page", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> ends <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].words += data


def read_page(file: Path) -> Element:
    reader = Reader()
    reader.feed(file.read_text(encoding="utf-8"))
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is never closed"
    return reader.open[0]


def image_in(image: Element) -> Image.Image:
    """The image of an `<img>`; the page must contain it."""
    kind, _, content = image.attributes["src"].partition(";base64,")
    assert kind in {"data:image/png", "data:image/jpeg"}
    shown = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    shown.load()
    return shown


def exact_metrics(section: Element) -> dict[str, float]:
    rows = section.all("details")[-1].all("tr")
    return {row.children[0].text: json.loads(row.children[1].text) for row in rows}


@dataclass
class Section:
    """A stage on the page of the tiny chain, with its run folder."""

    element: Element
    folder: Path

    @property
    def metrics(self) -> dict[str, float]:
        return json.loads((self.folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def page(chain) -> Element:
    return read_page(chain.run_folder("quickstart") / "report.html")


@pytest.fixture(scope="module")
def sections(chain, page: Element) -> dict[str, Section]:
    """The stages by name; each section names its run folder."""
    found = {}
    for element in page.all("section"):
        folder = chain.home / element.of_class("facts")[0].text.split(" · ")[-1]
        found[element.all("h2")[0].text] = Section(element, folder)
    return found


def test_every_stage_has_its_section(chain, page: Element, sections: dict[str, Section]) -> None:
    config = OmegaConf.load(chain.run_folder("quickstart") / "config.yaml")
    assert list(sections) == list(config.stages)
    assert sections["vqvae"].folder == chain.run_folder("vqvae")
    assert str(chain.run_folder("quickstart").relative_to(chain.home) / "report.html") in chain.stdout


def test_page_needs_nothing_from_elsewhere(page: Element) -> None:
    assert not page.all("script") and not page.all("link")
    targets = {found.attributes["id"] for found in page.all("h2")}
    assert {link.attributes["href"] for link in page.all("a")} == {f"#{target}" for target in targets}
    assert "url(" not in page.all("style")[0].text


def test_contact_sheets_are_embedded(sections: dict[str, Section]) -> None:
    for section in sections.values():
        shown = [
            image_in(shown_image) for sheet in section.element.of_class("sheet") for shown_image in sheet.all("img")
        ]
        saved = [Image.open(section.folder / sheet) for sheet in SHEETS if (section.folder / sheet).exists()]
        assert [image.tobytes() for image in shown] == [image.tobytes() for image in saved]
    assert sections["vqvae"].element.of_class("sheet") and sections["generate"].element.of_class("sheet")


def test_prompts_are_on_the_page(sections: dict[str, Section]) -> None:
    lines = (sections["generate"].folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    items = sections["generate"].element.all("li")
    assert [item.text for item in items] == [json.loads(line)["prompt"] for line in lines]
    assert {item.attributes["lang"] for item in items} == {"zh"}


def test_numbers_are_those_of_metrics_json(page: Element, sections: dict[str, Section]) -> None:
    for section in sections.values():
        assert exact_metrics(section.element) == section.metrics
    for table in page.of_class("metrics")[0].all("table"):
        saved = sections[table.all("a")[0].text].metrics
        shown = {row.children[0].text: float(row.children[1].text.replace(",", "")) for row in table.all("tr")}
        assert shown == pytest.approx({key: saved[key] for key in shown}, rel=1e-3)
        assert shown.keys() >= {key for key in saved if key.startswith(("val/", "eval/", "toy/"))}
        assert not [key for key in shown if key.startswith("perf/")]


def test_training_stages_have_curves(sections: dict[str, Section]) -> None:
    for section in sections.values():
        logged = {
            key.partition("/")[2] for key in section.metrics if key.startswith(("train/loss", "train/psnr", "val/"))
        }
        assert {drawing.attributes["aria-label"] for drawing in section.element.all("svg")} == {
            f"{name} over steps" for name in logged
        }


# --- folders made by hand ---------------------------------------------------------------------------

COLOURS = 16


def scored_folder(folder: Path) -> Path:
    """Image i has grey 10 · i and caption loss i; the file lists the images in another order."""
    folder.mkdir()
    records = []
    for number in range(COLOURS):
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(folder / f"{number}.png")
        records.append({"prompt": f"图{number}", "file": f"{number}.png", "caption_loss": float(number)})
    records = records[1::2] + records[::2]
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def section_of(stage: Path, tmp_path: Path) -> Element:
    file = write_report(tmp_path, "by hand", {"a stage": Stage(stage, {"a/number": 1.5}, 60.0)})
    (section,) = read_page(file).all("section")
    return section


def strip(element: Element) -> list[tuple[str, int]]:
    """Words and grey of the images of a strip."""
    return [
        (
            figure.all("span")[0].text + figure.all("figcaption")[0].words,
            image_in(figure.all("img")[0]).getpixel((5, 5))[0],
        )  # type: ignore[index]
        for figure in element.all("figure")
    ]


def test_best_and_worst_by_caption_loss(tmp_path: Path) -> None:
    best, worst = section_of(scored_folder(tmp_path / "stage"), tmp_path).of_class("strip")
    assert strip(best) == [(f"图{number}{number}.000", 10 * number) for number in range(6)]
    assert strip(worst) == [(f"图{number}{number}.000", 10 * number) for number in range(15, 9, -1)]


def test_few_scored_images_are_shown_once(tmp_path: Path) -> None:
    stage = scored_folder(tmp_path / "stage")
    lines = (stage / "samples.jsonl").read_text().splitlines()[:3]  # caption losses 1, 3, 5
    (stage / "samples.jsonl").write_text("\n".join(lines))
    best, worst = section_of(stage, tmp_path).of_class("strip")
    assert [grey for _, grey in strip(best)] == [10, 30]
    assert [grey for _, grey in strip(worst)] == [50]


def test_images_of_rerank_lie_where_its_pairs_were(tmp_path: Path) -> None:
    pairs = scored_folder(tmp_path / "generated")
    stage = tmp_path / "stage"
    stage.mkdir()
    (pairs / "samples.jsonl").rename(stage / "samples.jsonl")
    for given in (pairs, pairs / "list.jsonl"):
        (stage / "config.yaml").write_text(json.dumps({"task": "rerank", "pairs": str(given)}))
        best, _ = section_of(stage, tmp_path).of_class("strip")
        assert [grey for _, grey in strip(best)] == [0, 10, 20, 30, 40, 50]


def test_texts_from_data_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&amp;')</script>"
    stage = scored_folder(tmp_path / "stage")
    records = [
        {"prompt": evil, "file": "0.png", "caption_loss": 0.5},
        {"prompt": evil, "file": '"><b>', "caption_loss": 0.6},
    ]
    (stage / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (stage / "skipped.jsonl").write_text(json.dumps({"key": "a\udcff" + evil, "reason": evil}) + "\n")
    (stage / "config.yaml").write_text(json.dumps({"task": evil, "seed": evil}))
    section = section_of(stage, tmp_path)
    assert not section.all("script") and not section.all("b")
    assert section.text.count(evil) == 8  # task twice, seed, list, two strips, key and reason
    assert section.all("img")[0].attributes["alt"] == evil


def test_captions_stand_beside_what_is_described(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    captions = [f"一个圆形 {number}" for number in range(30)]
    records = [{"file": "a.png", "caption": caption} for caption in captions]
    (stage / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (stage / "config.yaml").write_text("task: generate\n")
    section = section_of(stage, tmp_path)
    assert section.all("p")[0].text == "Wrote a caption for each image. It took 1 min 0 s."
    assert [item.text for item in section.all("li")] == captions[:24]


def test_skipped_samples_are_counted(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    lines = [json.dumps({"key": f"{number}.png", "reason": "cut off"}) for number in range(1200)]
    (stage / "skipped.jsonl").write_text("\n".join([*lines, '{"key": "cut o']))
    section = section_of(stage, tmp_path)
    assert [heading.text for heading in section.all("h3")] == ["Left out: 1,200"]
    assert [item.text for item in section.all("li")][::5] == ["0.png: cut off", "and 1,195 more in skipped.jsonl"]


def test_curves_are_what_was_logged(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    with SummaryWriter(str(stage / "tensorboard")) as writer:
        for step in range(1001):
            writer.add_scalar("train/loss_image", 10 - step / 100, step)  # 10 … 0
        for step, value in ((500, 5.0), (750, float("nan")), (1000, 10.0)):
            writer.add_scalar("val/loss_image", value, step)
        writer.add_scalar("train/gradient_norm", 1.0, 0)
    (drawing,) = section_of(stage, tmp_path).all("svg")
    lines = {line.attributes["class"].split()[1]: line.attributes["points"] for line in drawing.all("polyline")}
    train, val = ([tuple(map(float, p.split(","))) for p in lines[split].split()] for split in ("train", "val"))
    (left, top), (right, bottom) = train[0], train[-1]
    assert len(train) == 200 and left < right and top < bottom
    assert val == [((left + right) / 2, (top + bottom) / 2), (right, top)]
    assert [text.text for text in drawing.all("text")] == [
        *("0", "5", "10"), *("0", "500", "1000"), "step", "loss_image", "train", "val"
    ]  # fmt: skip


def test_large_sheets_are_made_to_fit(tmp_path: Path) -> None:
    stages = {}
    for name in ("one", "two"):
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        noise = to_pil_image(torch.randint(0, 256, (3, 1500, 1000), dtype=torch.uint8))
        for sheet in ("reconstructions.png", "samples/grid.png"):
            noise.save(folder / sheet, compress_level=0)
        stages[name] = Stage(folder, {}, 1.0)
    file = write_report(tmp_path, "large", stages)
    shapes = [image_in(found).size for found in read_page(file).all("img")]
    assert file.stat().st_size < 5_000_000
    assert len(shapes) == 4 and all(width >= 480 and 1.45 < height / width < 1.55 for width, height in shapes)
