"""task=tokenize: captioned pictures → token store, resumable, with a list of the pictures that could not be read."""

from __future__ import annotations

import time

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from cogview_pl.checkpoints.store import ImageTokenizer, save_image_tokenizer
from cogview_pl.config import Config, StoreFormat
from cogview_pl.data.codes import StoreWriter
from cogview_pl.data.released import TEXT_LENGTH
from cogview_pl.data.skips import ImageBatch, SkipLog, collate_images, enough_to_judge
from cogview_pl.errors import UserError
from cogview_pl.tasks.models import open_image_tokenizer
from cogview_pl.tasks.run_folder import RunFolder, predecessor
from cogview_pl.tasks.sources import CaptionedImages, open_images
from cogview_pl.vocab import TextTokenizer

STORE = "store"
TEXT_MODEL = "text.model"
IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
_SPLITS = ("train", "val")


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Tokenise both splits; returns counts and speed."""
    vqvae_run = predecessor(config.outputs, "vqvae", "image_tokenizer.path", config.image_tokenizer.path)
    images = open_image_tokenizer(config, vqvae_run, "image_tokenizer.path")
    _check_size(config, images)
    sources = {split: open_images(config.data, split) for split in _SPLITS}
    text = _text_tokenizer(config, folder, sources["train"])
    row_format = config.store.format
    writer = StoreWriter(
        folder / STORE,
        text_length=TEXT_LENGTH if row_format == StoreFormat.cogview else config.text.max_length,
        grid=images.grid,
        num_pieces=text.num_pieces,
        num_codes=images.model.num_codes,
        text_tokenizer=text.identity,
        image_tokenizer=images.identity,
        splits={split: len(source) for split, source in sources.items()},
        format=row_format.value,
    )
    save_image_tokenizer(folder / IMAGE_TOKENIZER_FOLDER, images)
    total = sum(map(len, sources.values()))
    skips = SkipLog(folder / "skipped.jsonl", config.data.max_skipped_share, enough_to_judge(total))
    seen_before = sum(writer.resume_index(split) for split in _SPLITS)
    skips.load_state({"seen": seen_before, "skipped": skips.count})
    started = time.perf_counter()
    for split, source in sources.items():
        _tokenise(config, split, source, images, text, writer, skips)
    writer.finish()
    seen = total - seen_before
    return {
        **{f"tokenize/rows_{name}": split.rows for name, split in writer.header.splits.items()},
        "tokenize/captions_cut": sum(split.truncated for split in writer.header.splits.values()),
        "tokenize/skipped": skips.count,
        "tokenize/num_pieces": text.num_pieces,
        "perf/pictures_per_s": seen / (time.perf_counter() - started),
    }


def _tokenise(
    config: Config,
    split: str,
    source: CaptionedImages,
    images: ImageTokenizer,
    text: TextTokenizer,
    writer: StoreWriter,
    skips: SkipLog,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = images.model.to(device).to(memory_format=torch.channels_last)
    start = writer.resume_index(split)
    loader: DataLoader[ImageBatch] = DataLoader(
        Subset(source, range(start, len(source))),  # type: ignore[arg-type]
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        collate_fn=collate_images,
    )
    with tqdm(total=len(source), initial=start, desc=split, unit="pic", disable=None) as progress:
        for batch in loader:
            seen = len(batch.images) + len(batch.skipped)
            skips.add(batch.skipped, seen)
            start += seen
            codes = torch.empty(0, *images.grid, dtype=torch.long)
            if len(batch.images):
                codes = model.encode(batch.images.to(device).float() / 255).cpu()
            pieces = [text.encode(caption) for caption in batch.texts]
            writer.append(split, pieces, codes, batch.keys, start)
            progress.update(seen)


def _text_tokenizer(config: Config, folder: RunFolder, train: CaptionedImages) -> TextTokenizer:
    """The given one, that of the interrupted run, or one learned from the captions."""
    file = folder / TEXT_MODEL
    if config.text.model is not None:
        tokenizer = TextTokenizer.load(config.text.model)
    elif file.exists():
        return TextTokenizer.load(file)
    else:
        tokenizer = TextTokenizer.train(
            (train.text(index) for index in range(len(train))),
            num_pieces=config.text.num_pieces,
            model_type=config.text.model_type,
            character_coverage=config.text.character_coverage,
        )
    tokenizer.save(file)
    return tokenizer


def _check_size(config: Config, images: ImageTokenizer) -> None:
    size = images.settings["image_size"]
    if config.data.image_size % images.model.downsampling or config.data.image_size != size:
        raise UserError(
            f"data.image_size={config.data.image_size}: the image tokenizer was trained on {size} pixels; "
            f"choose the same image_tokenizer as its run, or data.image_size={size}"
        )
