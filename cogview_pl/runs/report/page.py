"""`report.html`: one page about all stages of a chain, with metrics, images and curves; it needs no server.

Everything is read from the run folders of the stages, so any chain has a page. Captions, file names and other texts
from data are escaped.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from cogview_pl.data.decoding.decode import ImageError, load_image
from cogview_pl.durable.write import write_bytes
from cogview_pl.runs.aims import Aim, Outcome, outcomes
from cogview_pl.runs.history import newest_config
from cogview_pl.runs.main_metrics import duration, main_metrics, rounded
from cogview_pl.runs.report.curves import draw_curve, read_curves
from cogview_pl.runs.run_folder import REPORT, SAMPLES, Metrics

_SENTENCES = {
    "vqvae": "Learned to encode an image as a grid of codes, and to decode it.",
    "tokenize": "Encoded every image as codes and every caption as text tokens, for the trainings that follow.",
    "pretrain": "Learned to generate the codes of an image from its text.",
    "super_resolution": "Learned to double the edge of an image, window by window.",
    "style": "Learned to generate images in the style that a prompt names.",
    "style_transfer": "Learned to show an image in the style that a prompt names.",
    "edit": "Learned to change an image as a prompt says.",
    "caption": "Learned to write the caption of an image; the loss of a caption ranks images.",
    "generate": "Generated images for each prompt.",
    "magnify": "Doubled the edge of images, window by window.",
    "rerank": "Ranked images by caption loss, best first.",
    "features": "Learned the features that compare images.",
    "evaluate": "Measured how good the images are.",
    "convert": "Wrote a model in another format.",
}
"""Task → sentence about its result."""
_DESCRIBED = "Wrote a caption for each image."  # for task=generate with a captioner

_RECONSTRUCTIONS, _GRID = "reconstructions.png", "samples/grid.png"  # contact sheets in a run folder
_SHEETS_BYTES = 3_000_000  # largest size of all contact sheets of a page; base64 adds a third
_SHEET_EDGES = (2000, 1600, 1200, 800, 480)  # longest edges to try for a sheet that is too large
_JPEG_QUALITY = 85
_THUMBNAIL = 128  # edge in pixels
_IN_STRIP = 6  # number of best, and of worst, images by caption loss
_TEXTS = 24  # number of prompts or captions in a list
_REASONS = 5  # number of skipped samples in the list


class Stage(NamedTuple):
    """A finished stage of a chain."""

    folder: Path
    metrics: Metrics
    seconds: float


def write_report(folder: Path, title: str, stages: Mapping[str, Stage], aims: Sequence[Aim] = ()) -> Path:
    """Write `report.html`.

    The page contains its images, and makes large ones smaller, so that it has about 5 MB at most.

    Args:
        folder: run folder of the chain; the page is written there.
        title: heading of the page.
        stages: name → stage, in order. Files in the folder of a stage may be missing.
        aims: aims of the recipe.

    Returns:
        Path of the page.
    """
    sheets = sum((stage.folder / sheet).exists() for stage in stages.values() for sheet in (_RECONSTRUCTIONS, _GRID))
    most_bytes = _SHEETS_BYTES // max(1, sheets)
    sections = [_section(number, name, stage, most_bytes) for number, (name, stage) in enumerate(stages.items(), 1)]
    reached = outcomes(aims, {name: stage.metrics for name, stage in stages.items()})
    total = sum(stage.seconds for stage in stages.values())
    page = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{Path(__file__).with_name('report.css').read_text(encoding='utf-8')}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="facts">{len(stages)} stages, {duration(total)} · {escape(str(folder))}</p>',
        _contents(stages, with_aims=bool(reached)),
        *_aims(reached),
        '<h2 id="metrics">Metrics</h2>',
        _main_metrics(stages),
        *sections,
        "</body>\n</html>\n",
    ]
    file = folder / REPORT
    # skipped.jsonl may hold file names that are no valid Unicode.
    write_bytes(file, "\n".join(page).encode("utf-8", "backslashreplace"))
    return file


# --- head of the page -------------------------------------------------------------------------------


def _contents(stages: Mapping[str, Stage], *, with_aims: bool) -> str:
    links = [
        f'<li><a href="#stage-{number}">{escape(name)}</a> ({duration(stage.seconds)})</li>'
        for number, (name, stage) in enumerate(stages.items(), 1)
    ]
    aims = ['<a href="#aims">Aims</a>'] if with_aims else []
    return "\n".join(["<nav>", *aims, '<a href="#metrics">Metrics</a>', "<ol>", *links, "</ol>", "</nav>"])


def _aims(found: Sequence[Outcome]) -> list[str]:
    """A table of the aims, each with the value and the bound."""
    if not found:
        return []
    rows = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in one.row)}</tr>" for one in found]
    return ['<h2 id="aims">Aims</h2>', "<table>", *rows, "</table>"]


def _main_metrics(stages: Mapping[str, Stage]) -> str:
    """One table per stage that has main metrics."""
    tables = []
    for number, (name, stage) in enumerate(stages.items(), 1):
        main = main_metrics(stage.metrics)
        if main:
            caption = f'<caption><a href="#stage-{number}">{escape(name)}</a></caption>'
            tables.append(_table({key: rounded(value) for key, value in main.items()}, caption))
    return "\n".join(['<div class="metrics">', *tables, "</div>"])


def _table(metrics: Mapping[str, str], caption: str = "") -> str:
    rows = [f'<tr><td>{escape(key)}</td><td class="number">{escape(value)}</td></tr>' for key, value in metrics.items()]
    return "\n".join([f"<table>{caption}", *rows, "</table>"])


# --- one stage --------------------------------------------------------------------------------------


def _section(number: int, name: str, stage: Stage, most_bytes: int) -> str:
    file = newest_config(stage.folder)
    config = OmegaConf.load(file) if file.exists() else OmegaConf.create()
    assert isinstance(config, DictConfig)
    records = _read_records(stage.folder / SAMPLES)
    parts = [
        f'<section>\n<h2 id="stage-{number}">{escape(name)}</h2>',
        f"<p>{_sentence(config, records)} It took {duration(stage.seconds)}.</p>",
        f'<p class="facts">{escape(_facts(config, stage.folder))}</p>',
        *_sheets(stage.folder, records, most_bytes),
        *_texts(records),
        *_best_and_worst(stage.folder, config, records),
        *_curves(stage.folder),
        *_skipped(_read_records(stage.folder / "skipped.jsonl")),
        _all_metrics(stage.metrics),
        "</section>",
    ]
    return "\n".join(parts)


def _sentence(config: DictConfig, records: list[dict[str, Any]]) -> str:
    task = str(config.get("task"))
    if task == "generate" and records and "caption" in records[0]:
        return _DESCRIBED
    return _SENTENCES.get(task, f"task={escape(task)}." if "task" in config else "")


def _facts(config: DictConfig, folder: Path) -> str:
    """Task, data set, seed and other keys of the run, in one line."""
    keys = ["task", "data._target_", "seed", "init_from"]
    if (folder / "tensorboard").is_dir():
        keys.append("trainer.max_steps")
    values = {key: OmegaConf.select(config, key) for key in keys}
    facts = [f"{key}={value}" for key, value in values.items() if value is not None]
    return " · ".join([*facts, str(folder)])


def _sheets(folder: Path, records: list[dict[str, Any]], most_bytes: int) -> list[str]:
    first = records[0] if records else {}
    titled = "Each caption and its image" if "caption" in first else "Each prompt and its images"
    names = {
        _RECONSTRUCTIONS: "Validation images, and under them their reconstructions",
        _GRID: "Before and after" if "source" in first else titled,
    }
    figures = []
    for sheet, caption in names.items():
        if (folder / sheet).exists():
            source = _sheet_source(folder / sheet, most_bytes)
            image = f'<img alt="{caption}" src="{source}">' if source else escape(f"{sheet} cannot be shown")
            figures.append(f'<figure class="sheet">{image}<figcaption>{caption}.</figcaption></figure>')
    return figures


def _texts(records: list[dict[str, Any]]) -> list[str]:
    """The first prompts or captions as text, to copy them, or to read them if the sheet has no Chinese font."""
    texts = [str(record["caption"]) for record in records if "caption" in record]
    kind = "Captions" if texts else "Prompts"
    texts = texts or list(dict.fromkeys(str(record["prompt"]) for record in records if record.get("prompt")))
    if not texts:
        return []
    items = [f"<li{_language(text)}>{escape(text)}</li>" for text in texts[:_TEXTS]]
    shown = f"{kind} as text (the first {len(items)})" if len(texts) > len(items) else f"{kind} as text"
    return [f"<details><summary>{shown}</summary><ol>", *items, "</ol></details>"]


def _best_and_worst(folder: Path, config: DictConfig, records: list[dict[str, Any]]) -> list[str]:
    scored = [record for record in records if isinstance(record.get("caption_loss"), float)]
    scored = sorted((r for r in scored if math.isfinite(r["caption_loss"])), key=lambda r: r["caption_loss"])
    best = scored[: min(_IN_STRIP, -(-len(scored) // 2))]
    worst = scored[len(best) :][-_IN_STRIP:][::-1]
    home = _home_of_files(folder, config)
    found = []
    for title, chosen in (("Best by caption loss", best), ("Worst by caption loss", worst)):
        if chosen:
            found += [f'<h3>{title}</h3>\n<div class="strip">', *(_thumbnail(r, home) for r in chosen), "</div>"]
    if found:
        meaning = "Caption loss: mean negative log-likelihood per token of the text, given the image; less is better."
        found.append(f'<p class="facts">{meaning}</p>')
    return found


def _home_of_files(folder: Path, config: DictConfig) -> Path:
    """Folder that `file` in the records is relative to; for task=rerank it is the folder of `pairs`."""
    if config.get("task") != "rerank" or not config.get("pairs"):
        return folder
    pairs = Path(config.pairs)
    return pairs if pairs.is_dir() else pairs.parent


def _thumbnail(record: dict[str, Any], home: Path) -> str:
    prompt = str(record.get("prompt", ""))
    try:
        image = to_pil_image(load_image(home / str(record.get("file", "")), _THUMBNAIL))
        shown = f'<img alt="{escape(prompt)}" src="{_jpeg_source(image)}">'
    except ImageError as error:
        shown = escape(f"{record.get('file')}: {error}")
    return (
        f"<figure>{shown}<figcaption><span{_language(prompt)}>{escape(prompt)}</span>"
        f"<br>{record['caption_loss']:.3f}</figcaption></figure>"
    )


def _curves(folder: Path) -> list[str]:
    drawings = [draw_curve(name, curve) for name, curve in read_curves(folder / "tensorboard").items()]
    return ["<h3>Curves</h3>", '<div class="curves">', *drawings, "</div>"] if drawings else []


def _skipped(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return []
    shown = records[:_REASONS]
    reasons = [
        f"<li>{escape(str(record.get('key', record.get('file'))))}: {escape(str(record.get('reason')))}</li>"
        for record in shown
    ]
    title = f"<h3>Left out: {len(records):,}</h3>"
    more = [f"<li>and {len(records) - len(shown):,} more in skipped.jsonl</li>"] if len(records) > len(shown) else []
    return [title, "<ul>", *reasons, *more, "</ul>"]


def _all_metrics(metrics: Metrics) -> str:
    exact = {key: json.dumps(value, ensure_ascii=False) for key, value in sorted(metrics.items())}
    return f"<details><summary>All {len(exact)} metrics</summary>{_table(exact)}</details>"


# --- shared by the parts ----------------------------------------------------------------------------


def _read_records(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; a line that is no JSON is left out, because a kill may have cut it."""
    records = []
    for line in file.read_bytes().split(b"\n") if file.exists() else ():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def _language(text: str) -> str:
    """`lang` attribute of a Chinese text: it selects Chinese glyphs for characters that Japanese shares."""
    return ' lang="zh"' if any("\u4e00" <= character <= "\u9fff" for character in text) else ""


def _sheet_source(file: Path, most_bytes: int) -> str | None:
    """A contact sheet as a `data:` URL, as a smaller JPEG if the file is too large; None if it cannot be read."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return None
    if file.stat().st_size <= most_bytes:
        return _source(file.read_bytes(), "png")
    for edge in _SHEET_EDGES:
        image.thumbnail((edge, edge))
        source = _jpeg_source(image)
        if len(source) * 3 // 4 <= most_bytes:
            break
    return source


def _jpeg_source(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return _source(stream.getvalue(), "jpeg")


def _source(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
