"""task=generate: prompts → pictures, `samples.jsonl` and a contact sheet."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from cogview_pl.config import Config, ToyDataConfig
from cogview_pl.data.toy import score
from cogview_pl.errors import UserError
from cogview_pl.generation import CogView, Sampling
from cogview_pl.generation.sheet import contact_sheet, load_font
from cogview_pl.tasks.run_folder import RunFolder, predecessor
from cogview_pl.tasks.sources import open_images

_SHEET_ROWS = 24
_SHEET_WIDTH = 8  # pictures across the contact sheet


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Paint every prompt; held-out captions of the toy world are judged as well."""
    model = CogView.load(predecessor(config.outputs, "pretrain", "init_from", config.init_from))
    prompts = read_prompts(config)
    model.tokenise(prompts)  # too long a prompt must not surface after an hour of painting,
    load_font(config.font, 12)  # nor a font file that is missing
    sampling = Sampling(config.sampler.temperature, config.sampler.top_k, config.sampler.top_p)
    started = time.perf_counter()
    pictures = _paint(config, folder, model, prompts, sampling)
    seconds = time.perf_counter() - started
    rows = [
        (prompt, pictures[i * config.num_images : (i + 1) * config.num_images])
        for i, prompt in enumerate(prompts[:_SHEET_ROWS])
    ]
    columns = max(1, _SHEET_WIDTH // config.num_images)
    sheet = contact_sheet(rows, columns=columns, cell=max(96, min(pictures[0].width, 256)), font=config.font)
    sheet.save(folder / "samples" / "grid.png")
    metrics = {
        "generate/pictures": len(pictures),
        "perf/pictures_per_s": len(pictures) / seconds,
        "perf/tokens_per_s": len(pictures) * model.template.target.length / seconds,
    }
    if config.prompts is None and isinstance(config.data, ToyDataConfig):
        metrics |= _judge(prompts, pictures, config.num_images)
    return metrics


def read_prompts(config: Config) -> list[str]:
    """The prompts of a run: `prompts`, or captions of the validation split.

    Raises:
        UserError: there are none, or the file is missing.
    """
    given = config.prompts
    if given is None:
        source = open_images(config.data, "val")
        return [source.text(index) for index in range(min(config.num_prompts, len(source)))]
    if given == "-":
        lines: Sequence[str] = sys.stdin.read().splitlines()
    elif isinstance(given, str):
        if not Path(given).is_file():
            raise UserError(
                f"prompts={given} is not a file; give a text file, a list prompts='[一个红色的圆形]', "
                "or - for standard input"
            )
        lines = Path(given).read_text(encoding="utf-8-sig").splitlines()
    else:
        lines = [str(prompt) for prompt in given]
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts={given} holds no text; give at least one prompt")
    return prompts


def _paint(
    config: Config, folder: RunFolder, model: CogView, prompts: list[str], sampling: Sampling
) -> list[Image.Image]:
    """Paint and save in order; a picture is on disk as soon as its batch is done."""
    total = len(prompts) * config.num_images
    batches = -(-total // config.sampler.batch_size)
    pictures: list[Image.Image] = []
    (folder / "samples").mkdir(exist_ok=True)
    with (
        tqdm(total=batches * model.template.target.length, unit="step", desc="paint", disable=None) as progress,
        (folder / "samples.jsonl").open("w", encoding="utf-8") as records,
    ):
        made = model.pictures(
            prompts,
            config.num_images,
            seed=config.seed,
            sampling=sampling,
            batch_size=config.sampler.batch_size,
            on_step=progress.update,
        )
        for index, picture in enumerate(islice(made, total)):
            prompt, number = divmod(index, config.num_images)
            file = Path("samples") / f"{prompt:04d}" / f"{number:02d}.png"
            (folder / str(file.parent)).mkdir(exist_ok=True)
            picture.save(folder / str(file))
            record = {
                "prompt": prompts[prompt],
                "file": str(file),
                "seed": config.seed + number,
                "width": picture.width,
                "height": picture.height,
            }
            records.write(json.dumps(record, ensure_ascii=False) + "\n")
            records.flush()
            pictures.append(picture)
    return pictures


def _judge(prompts: list[str], pictures: list[Image.Image], num_images: int) -> dict[str, float]:
    """Share of named objects whose attributes the judge of the toy world finds in the pictures."""
    images = torch.stack([pil_to_tensor(picture) for picture in pictures])
    repeated = [prompt for prompt in prompts for _ in range(num_images)]
    return {f"toy/{name}": float(value) for name, value in asdict(score(images, repeated)).items()}
