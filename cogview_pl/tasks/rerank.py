"""task=rerank: prompts and picture files → caption loss of each pair, and their order."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from torch import Tensor

from cogview_pl.config import Config
from cogview_pl.data.images import SampleError, load_picture
from cogview_pl.errors import UserError
from cogview_pl.generation.companions import Captioner
from cogview_pl.tasks.describe import encode
from cogview_pl.tasks.models import inference_device, open_sequence_model
from cogview_pl.tasks.run_folder import RunFolder, predecessor

_SAMPLES = "samples.jsonl"


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Write `samples.jsonl`: the pairs of each prompt, lowest caption loss first; `skipped.jsonl`: unreadable files."""
    file = _pairs_file(config)
    pairs = _read_pairs(file)
    path = predecessor(config.outputs, "caption", "rerank_with", config.rerank_with)
    loaded = open_sequence_model(config, path, "rerank_with", config.rerank_template)
    device, dtype = inference_device(config)
    captioner = Captioner(loaded, device, dtype)
    size = loaded.image_tokenizer.settings["image_size"]
    readable, images, skipped = _load(file.parent, pairs, size)
    if not readable:
        raise UserError(f"pairs={config.pairs}: none of the {len(pairs)} pictures can be read; see their names in it")
    codes = encode(images, loaded.image_tokenizer, device, config.sampler.batch_size)
    losses = captioner.losses([pair["prompt"] for pair in readable], codes, config.sampler.batch_size)
    scored = [{**pair, "caption_loss": loss} for pair, loss in zip(readable, losses, strict=True)]
    place = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair["prompt"] for pair in readable))}
    _write(folder / _SAMPLES, sorted(scored, key=lambda pair: (place[str(pair["prompt"])], pair["caption_loss"])))
    if skipped:
        _write(folder / "skipped.jsonl", skipped)
    return {"rerank/pairs": len(scored), "rerank/skipped": len(skipped), "rerank/caption_loss": fmean(losses)}


def _pairs_file(config: Config) -> Path:
    path = Path(str(config.pairs))
    file = path / _SAMPLES if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"pairs={path}: {file} does not exist; give a run folder of task=generate or a .jsonl file")
    return file


def _read_pairs(file: Path) -> list[dict[str, str]]:
    pairs = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            pairs.append({"prompt": str(record["prompt"]), "file": str(record["file"])})
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'pairs={file}, line {number}: expected {{"prompt": …, "file": …}}, found {line[:60]!r}'
            ) from None
    if not pairs:
        raise UserError(f"pairs={file} holds no pairs")
    return pairs


def _load(
    root: Path, pairs: list[dict[str, str]], size: int
) -> tuple[list[dict[str, str]], list[Tensor], list[dict[str, str]]]:
    """The pairs whose pictures can be read, those pictures, and the others with the reason."""
    readable: list[dict[str, str]] = []
    images: list[Tensor] = []
    skipped: list[dict[str, str]] = []
    for pair in pairs:
        try:
            images.append(load_picture(root / pair["file"], size))
            readable.append(pair)
        except SampleError as error:
            skipped.append({**pair, "reason": str(error)})
    return readable, images, skipped


def _write(file: Path, records: list[dict[str, object]] | list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
