"""Pillow's test images, hostile ones among them, through decoding, `vqvae` and `tokenize`: `nox -s realfiles`.

    python -m benchmarks.real_files ARCHIVE [--json FILE]

ARCHIVE is the source distribution of Pillow, which carries its test images; the repository does not. The table tells
how many files were read, why others were refused, which took longest, and whose colours differ from those that OpenCV
reads. Colour profiles explain differences: OpenCV ignores them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from cogview_pl.data.config import Crop, Decoding
from cogview_pl.data.decoding.decode import SampleError, decode_image

_EDGE = 32
_SLOWEST = 5
_TOLERANCE = 3  # mean difference of levels; decoders round
_ORIENTATION = 0x0112
_PAD = Decoding(crop=Crop.pad)
_STEPS = ("trainer.max_steps=4", "trainer.val_check_interval=4", "image_tokenizer.quantize_after_steps=0")


@dataclass
class Findings:
    """What was seen; files by name."""

    read: int = 0
    refused: dict[str, list[str]] = field(default_factory=dict)
    """Files by reason."""
    mended: dict[str, str] = field(default_factory=dict)
    slowest: list[tuple[float, str]] = field(default_factory=list)
    compared: int = 0
    with_profile: dict[str, float] = field(default_factory=dict)
    """Mean difference of colours of files with a colour profile."""
    wrong: dict[str, float] = field(default_factory=dict)
    """Mean difference of colours of other files."""
    runs: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of `vqvae` and `tokenize`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    with tempfile.TemporaryDirectory() as scratch:
        root = unpack(given.archive, Path(scratch))
        files = sorted(path for path in root.rglob("*") if path.is_file())
        write_list(root, files)
        findings = decode(root, files)
        findings.runs = run_tasks(root, Path(scratch))
    print(table(findings, len(files)))
    if given.json:
        given.json.write_text(json.dumps(asdict(findings), ensure_ascii=False, indent=1))


def unpack(archive: Path, folder: Path) -> Path:
    """The test images of an archive, in a folder."""
    with tarfile.open(archive) as tar:
        members = [one for one in tar.getmembers() if re.match(r"[^/]+/Tests/images/", one.name)]
        tar.extractall(folder, members, filter="data")
    return next(folder.glob("*/Tests/images"))


def write_list(root: Path, files: list[Path]) -> None:
    """A list that names all files, whatever their extensions, with their names as captions."""
    lines = [json.dumps({"file_name": str(file.relative_to(root)), "text": file.stem}) for file in files]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def decode(root: Path, files: list[Path]) -> Findings:
    """Decode all files, and compare those that OpenCV reads too."""
    found = Findings()
    times = []
    for file in files:
        name, began = str(file.relative_to(root)), time.perf_counter()
        image, reason = None, ""
        try:
            image = decode_image(file, _EDGE, options=_PAD)
        except SampleError as error:
            reason = str(error)
        times.append((round(time.perf_counter() - began, 3), name))
        if image is None:
            found.refused.setdefault(kind_of(reason), []).append(name)
            continue
        found.read += 1
        if image.remark:
            found.mended[name] = image.remark
        compare(found, file, name, image.pixels.permute(1, 2, 0).numpy())
    found.slowest = sorted(times, reverse=True)[:_SLOWEST]
    return found


def kind_of(reason: str) -> str:
    """A reason without its numbers."""
    return re.sub(r"\d[\d,]*", "N", reason)


def compare(found: Findings, file: Path, name: str, ours: np.ndarray) -> None:
    other = independent(file)
    if other is None:
        return
    found.compared += 1
    difference = float(np.abs(ours.astype(float) - other.astype(float)).mean())
    if difference > _TOLERANCE:
        (found.with_profile if has_profile(file) else found.wrong)[name] = round(difference, 1)


def independent(file: Path) -> np.ndarray | None:
    """RGB `(edge, edge, 3)` as OpenCV reads a file, upright and on white, resized as ours; None where it cannot."""
    try:
        pixels = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        if pixels is not None and (pixels.ndim == 2 or pixels.shape[2] == 3):  # it makes some palettes grey
            pixels = cv2.imread(str(file), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    if pixels is None or pixels.dtype not in (np.uint8, np.uint16) or pixels.shape[2] not in (3, 4):
        return None
    levels = (pixels >> 8 if pixels.dtype == np.uint16 else pixels).astype(np.float32)
    if levels.shape[2] == 4:
        alpha = levels[..., 3:] / 255
        levels = levels[..., :3] * alpha + 255 * (1 - alpha)
    stream = io.BytesIO()
    Image.fromarray(levels[..., ::-1].round().astype(np.uint8)).save(stream, "PNG", exif=orientation(file))
    return decode_image(stream, _EDGE, options=_PAD).pixels.permute(1, 2, 0).numpy()


def orientation(file: Path) -> Image.Exif:
    """The orientation that the metadata of a file name."""
    exif = Image.Exif()
    with Image.open(file) as image:
        found = image.getexif().get(_ORIENTATION)
    if found is not None:
        exif[_ORIENTATION] = found
    return exif


def has_profile(file: Path) -> bool:
    with Image.open(file) as image:
        return bool(image.info.get("icc_profile"))


def run_tasks(root: Path, home: Path) -> dict[str, dict[str, float]]:
    """Metrics of `vqvae` and `tokenize` on the files."""
    data = ("data=folder", f"data.root={root}", "data.max_skipped_share=1", "data.val_fraction=0.1")
    train = ("task=vqvae", *_STEPS, "data.batch_size=64", "~callbacks.progress")
    tasks = {"vqvae": train, "tokenize": ("task=tokenize",)}
    metrics = {}
    for name, overrides in tasks.items():
        command = (sys.executable, "-m", "cogview_pl.run", *overrides, *data, f"run_dir={home / name}")
        subprocess.run(command, cwd=home, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        metrics[name] = json.loads((home / name / "metrics.json").read_text())
        data = (*data, f"image_tokenizer.path={home / 'vqvae' / 'model'}")
    return metrics


def table(found: Findings, files: int) -> str:
    lines = [f"{found.read} of {files} files read"]
    reasons = sorted(found.refused.items(), key=lambda item: -len(item[1]))
    lines += [f"refused {len(names)}: {reason} ({', '.join(names[:3])})" for reason, names in reasons]
    lines += [f"mended {number}: {remark}" for remark, number in Counter(found.mended.values()).items()]
    lines += [f"slow: {seconds:.2f} s {name}" for seconds, name in found.slowest]
    lines.append(f"{found.compared} compared with OpenCV: {len(found.wrong)} others differ, by mean level")
    lines += [f"differs by {difference}: {name}" for name, difference in found.wrong.items()]
    lines += [f"with a profile, by {difference}: {name}" for name, difference in found.with_profile.items()]
    for task, metrics in found.runs.items():
        counts = {
            name: value for name, value in metrics.items() if "skipped" in name or "rows" in name or "mended" in name
        }
        lines.append(f"{task}: {counts}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
