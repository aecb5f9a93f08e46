"""task=tokenize: captioned images → token store, resumable, with a list of the images that could not be read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from cogview_pl.assembly.image_data import CaptionedImages, at_twice_the_size, image_inputs, open_images
from cogview_pl.assembly.models import open_image_tokenizer
from cogview_pl.checkpoints.model_folder import ImageTokenizer, SequenceModel, save_image_tokenizer
from cogview_pl.config.parts import model_options
from cogview_pl.config.schema import Config
from cogview_pl.data.bad_samples import ImageBatch, SkipLog, collate_images, enough_to_judge
from cogview_pl.data.config import StoreFormat
from cogview_pl.data.loader import Loader, ignore_interrupts
from cogview_pl.data.token_store.cogview_bin import TEXT_LENGTH
from cogview_pl.data.token_store.store import StoreWriter
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.runs.run_folder import RunFolder, predecessor
from cogview_pl.vocab import TextTokenizer

STORE = "store"
TEXT_MODEL = "text.model"
IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
_SPLITS = ("train", "val")


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Tokenise both splits; returns counts and speed."""
    return tokenise(config, folder, folder.path, None)


def tokenise(config: Config, run: RunFolder, folder: Path, start: SequenceModel | None) -> dict[str, float]:
    """Write `store/`, `text.model`, `image_tokenizer/` and maybe `skipped.jsonl` into a folder, or go on with them.

    Args:
        config: `data`, `store` and `text` are what it is about.
        run: the folder of the run, which begins once everything has been checked.
        folder: the folder, which exists.
        start: a model whose tokenizers are to be used; None: the image tokenizer of the newest vqvae run (or
            `image_tokenizer.path`), and `text.model` or a text tokenizer that is learned from the captions.

    Raises:
        UserError: the images, the tokenizers or an unfinished store do not fit together.
    """
    images = start.image_tokenizer if start else _image_tokenizer(config)
    _check_size(config, images)
    source_config = at_twice_the_size(config.data) if config.token_store.large else config.data
    sources = {split: open_images(source_config, split) for split in _SPLITS}
    run.require_same({}, image_inputs(sources), config.verify)
    text = _text_tokenizer(config, folder / TEXT_MODEL, start.text if start else None, sources["train"])
    row_format = config.token_store.format
    writer = StoreWriter(
        folder / STORE,
        text_length=TEXT_LENGTH if row_format == StoreFormat.cogview else config.text.max_length,
        grid=images.grid,
        text_vocab_size=text.vocab_size,
        codebook_size=images.model.codebook_size,
        text_tokenizer=text.identity,
        image_tokenizer=images.identity,
        splits={split: len(source) for split, source in sources.items()},
        format=row_format.value,
        large=config.token_store.large,
    )
    run.begin()
    text.save(folder / TEXT_MODEL)
    save_image_tokenizer(folder / IMAGE_TOKENIZER_FOLDER, images)
    total = sum(map(len, sources.values()))
    skips = SkipLog(folder / "skipped.jsonl", config.data.max_skipped_share, enough_to_judge(total))
    seen_before = sum(writer.resume_index(split) for split in _SPLITS)
    skips.load_state({"seen": seen_before, "skipped": skips.count})
    started = time.perf_counter()
    if not writer.header.complete:
        for split, source in sources.items():
            _tokenise_split(config, split, source, images, text, writer, skips)
        writer.finish()
    return {
        **{f"tokenize/rows_{name}": split.rows for name, split in writer.header.splits.items()},
        "tokenize/captions_cut": sum(split.truncated for split in writer.header.splits.values()),
        "tokenize/skipped": skips.count,
        "tokenize/text_vocab_size": text.vocab_size,
        "perf/images_per_s": (total - seen_before) / (time.perf_counter() - started),
    }


def _tokenise_split(
    config: Config,
    split: str,
    source: CaptionedImages,
    tokenizer: ImageTokenizer,
    text: TextTokenizer,
    writer: StoreWriter,
    skips: SkipLog,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.model.to(device).to(memory_format=torch.channels_last)
    size = tokenizer.settings["image_size"]
    start = writer.resume_index(split)
    loader: Loader[ImageBatch] = Loader(
        Subset(source, range(start, len(source))),  # type: ignore[arg-type]
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        collate_fn=collate_images,
        worker_init_fn=ignore_interrupts,
        patience=config.data.worker_timeout,
        look=SIGNALS.check,
    )
    with tqdm(total=len(source), initial=start, desc=split, unit="pic", disable=None) as progress:
        for batch in loader:
            SIGNALS.check()
            seen = len(batch.images) + len(batch.skipped)
            skips.add(batch.skipped, seen)
            start += seen
            images = batch.images.to(device)
            codes = _codes(tokenizer, images, size)
            large = _codes(tokenizer, images, 2 * size) if config.token_store.large else None
            text_tokens = [text.encode(caption) for caption in batch.texts]
            writer.append(split, text_tokens, codes, batch.keys, start, large)
            progress.update(seen)


def _codes(tokenizer: ImageTokenizer, images: Tensor, edge: int) -> Tensor:
    """Codes, on the CPU, of images `(B, 3, Y, X)` resized to an edge."""
    if not len(images):
        grid = edge // tokenizer.model.downsampling
        return torch.empty(0, grid, grid, dtype=torch.long)
    images = resize(images, [edge, edge], InterpolationMode.BICUBIC, antialias=True)
    return tokenizer.model.encode(images.float() / 255).cpu()


def _image_tokenizer(config: Config) -> ImageTokenizer:
    path = predecessor(config.outputs, "vqvae", "image_tokenizer.path", config.image_tokenizer.path)
    return open_image_tokenizer(model_options(config), path, "image_tokenizer.path")


def _text_tokenizer(config: Config, file: Path, given: TextTokenizer | None, train: CaptionedImages) -> TextTokenizer:
    """The given one, that of the interrupted run, or one learned from the captions."""
    if given is not None:
        return given
    if config.text.model is not None:
        return TextTokenizer.load(config.text.model)
    if file.exists():
        return TextTokenizer.load(file)
    return TextTokenizer.train(
        _captions(train),
        vocab_size=config.text.vocab_size,
        model_type=config.text.model_type,
        character_coverage=config.text.character_coverage,
    )


def _captions(images: CaptionedImages) -> Iterator[str]:
    for index in range(len(images)):
        SIGNALS.check()
        yield images.text(index)


def _check_size(config: Config, tokenizer: ImageTokenizer) -> None:
    size = tokenizer.settings["image_size"]
    if config.data.image_size % tokenizer.model.downsampling or config.data.image_size != size:
        raise UserError(
            f"data.image_size={config.data.image_size}: the image tokenizer was trained on {size} pixels; "
            f"choose the same image_tokenizer as its run, or data.image_size={size}"
        )
