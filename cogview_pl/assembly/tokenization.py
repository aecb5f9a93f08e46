"""Makes a token store from captioned images. It can resume, and lists images that cannot be read."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from cogview_pl.assembly.image_data import image_inputs, open_images
from cogview_pl.checkpoints.model_folder import ImageTokenizer, save_image_tokenizer
from cogview_pl.data.bad_samples import BadSampleLog, ImageBatch, collate_images
from cogview_pl.data.config import DataConfig, StoreFormat, TokenStoreConfig
from cogview_pl.data.loader import Loader, suitable_workers
from cogview_pl.data.mended import MendedLog
from cogview_pl.data.samples import CaptionedImages, Skipped
from cogview_pl.data.sharing import Team, batches_of
from cogview_pl.data.token_store.cogview_bin import TEXT_LENGTH
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.lit.bars import Bar, status
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.vocab import TextTokenizer
from cogview_pl.vocab.config import TextConfig
from cogview_pl.vocab.roles import text_fields

TOKEN_STORE = "token_store"
TEXT_MODEL = "text.model"
IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
_SPLITS = ("train", "val")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenization:
    """Options of a token store: images, rows, text tokenizer, and the layout that names the text fields."""

    data: DataConfig
    rows: TokenStoreConfig
    text: TextConfig
    layout: str
    verify: bool
    """Whether a resumed run checks that its data have not changed."""
    device: str
    """Device of the image tokenizer."""


def tokenise(
    options: Tokenization, images: ImageTokenizer, text: TextTokenizer | None, run: RunFolder, folder: Path, team: Team
) -> dict[str, float]:
    """Write `token_store/`, `text.model`, `image_tokenizer/` and `skipped.jsonl` into a folder, or continue them.

    Args:
        options: see `Tokenization`.
        images: image tokenizer.
        text: text tokenizer; None: `text.model`, or one that is learned from the texts.
        run: folder of the run; it begins after all checks.
        folder: existing folder to write into.
        team: the processes that encode images; the first one writes.

    Returns:
        Counts and speed; empty in all processes but the first.

    Raises:
        UserError: the images, the tokenizers or an unfinished token store do not fit each other.
    """
    fields = text_fields(options.layout)
    _check(options, images, fields)
    data = options.data.at_twice_the_size() if options.rows.large else options.data
    sources = {split: open_images(data, split, fields) for split in _SPLITS}
    encoder = _Encoder(options, images, fields, team)
    if not team.first:
        encoder.text = TextTokenizer(team.tell(b""))
        for split, source in sources.items():
            for _ in encoder.encoded(split, source, team.tell(0)):
                pass
        return {}
    run.require_same({}, image_inputs(sources), options.verify)
    text = text or _text_tokenizer(options.text, folder / TEXT_MODEL, _texts(sources["train"], fields))
    cogview = options.rows.format == StoreFormat.cogview
    writer = TokenStoreWriter(
        folder / TOKEN_STORE,
        text_length=TEXT_LENGTH if cogview else options.text.max_length,
        grid=images.grid,
        text_vocab_size=text.vocab_size,
        codebook_size=images.model.codebook_size,
        text_tokenizer=text.identity,
        image_tokenizer=images.identity,
        splits={split: len(source) for split, source in sources.items()},
        format=options.rows.format.value,
        large=options.rows.large,
        text_fields=fields,
        cut=text.cut,
        commit_seconds=options.rows.commit_seconds,
    )
    run.begin()
    text.save(folder / TEXT_MODEL)
    save_image_tokenizer(folder / IMAGE_TOKENIZER_FOLDER, images)
    total = sum(map(len, sources.values()))
    bad_samples = BadSampleLog(folder / "skipped.jsonl", options.data.max_skipped_share)
    mended = MendedLog(folder / "mended.jsonl")
    seen_before = sum(writer.resume_index(split) for split in _SPLITS)
    if not seen_before:
        _look_for_bad_samples(sources, bad_samples)
    encoder.text = TextTokenizer(team.tell(text.serialized))
    started = time.perf_counter()
    with writer:
        for split, source in sources.items():
            for batch in encoder.encoded(split, source, team.tell(writer.resume_index(split))):
                bad_samples.note(batch.skipped)
                bad_samples.require_few(total)
                mended.add(batch.remarks)
                next_index = writer.resume_index(split) + batch.seen
                writer.append(split, batch.text_tokens, batch.codes, batch.keys, next_index, batch.large)
    if not writer.header.complete:
        writer.finish()
    if mended.count:
        _log.info("%s", mended.summary())
    return {
        **{f"tokenize/rows_{name}": split.rows for name, split in writer.header.splits.items()},
        "tokenize/captions_cut": sum(split.truncated for split in writer.header.splits.values()),
        "tokenize/skipped": bad_samples.count,
        "tokenize/mended": mended.count,
        "tokenize/text_vocab_size": text.vocab_size,
        "perf/images_per_s": (total - seen_before) / (time.perf_counter() - started),
    }


def _look_for_bad_samples(sources: Mapping[str, CaptionedImages], bad_samples: BadSampleLog) -> None:
    """List what is known to be bad; raises UserError if that, or a random probe, is too much."""
    total = sum(map(len, sources.values()))
    status("reading the captions …")
    for images in sources.values():
        bad_samples.note(images.known_bad())
    bad_samples.require_few(total)
    status("reading a probe of the images …")
    bad_samples.require_few_in_probe(sources["train"], SIGNALS.check)


class Encoded(NamedTuple):
    """A batch of samples as rows of the store, and the samples that were skipped."""

    text_tokens: dict[str, list[list[int]]]
    codes: Tensor
    large: Tensor | None
    keys: list[str]
    skipped: list[Skipped]
    remarks: Mapping[str, str]

    @property
    def seen(self) -> int:
        """Number of samples that were read."""
        return len(self.keys) + len(self.skipped)


@dataclass
class _Encoder:
    """Reads and encodes images; the processes of a team take turns."""

    options: Tokenization
    tokenizer: ImageTokenizer
    fields: Sequence[str]
    team: Team
    text: TextTokenizer | None = None

    def encoded(self, split: str, source: CaptionedImages, start: int) -> Iterator[Encoded]:
        """The samples from `start` on, in batches and in order, in the first process; nothing in the others."""
        data = self.options.data
        batches = batches_of(range(start, len(source)), data.batch_size)
        loader: Loader[ImageBatch] = Loader(
            source,
            batch_sampler=self.team.own(batches),
            num_workers=suitable_workers(data.num_workers, len(source), self.team.size),
            collate_fn=collate_images,
            patience=data.worker_timeout,
            look=SIGNALS.check,
        )
        self.tokenizer.model.to(self.options.device).to(memory_format=torch.channels_last)
        read = iter(loader) if len(batches) > self.team.rank else iter(())
        with Bar(f"tokenize {split}", len(source), "images", done=start) as bar:
            for found in self.team.in_order(lambda _: self._encode(next(read)), batches):
                yield found
                bar.update(found.seen)

    def _encode(self, batch: ImageBatch) -> Encoded:
        SIGNALS.check()
        assert self.text is not None
        size = self.tokenizer.settings["image_size"]
        images = batch.images.to(self.options.device)
        return Encoded(
            {field: [self.text.encode(one) for one in batch.texts_of(field)] for field in self.fields},
            _codes(self.tokenizer, images, size),
            _codes(self.tokenizer, images, 2 * size) if self.options.rows.large else None,
            batch.keys,
            batch.skipped,
            batch.remarks,
        )


def _codes(tokenizer: ImageTokenizer, images: Tensor, edge: int) -> Tensor:
    """Codes, on the CPU, of images `(B, 3, Y, X)` resized to an edge."""
    if not len(images):
        grid = edge // tokenizer.model.downsampling
        return torch.empty(0, grid, grid, dtype=torch.long)
    images = resize(images, [edge, edge], InterpolationMode.BICUBIC, antialias=True)
    return tokenizer.model.encode(images.float() / 255).cpu()


def _text_tokenizer(options: TextConfig, file: Path, texts: Iterator[str]) -> TextTokenizer:
    """The tokenizer of `text.model`, else of the interrupted run, else one that is learned from the texts."""
    if options.model is not None:
        return TextTokenizer.load(options.model)
    if file.exists():
        return TextTokenizer.load(file)
    status("learning the text tokenizer from the captions …")
    return TextTokenizer.train(texts, options)


def _texts(images: CaptionedImages, fields: Sequence[str]) -> Iterator[str]:
    for index in range(len(images)):
        SIGNALS.check()
        for field in fields:
            yield images.text(index, field)


def _check(options: Tokenization, tokenizer: ImageTokenizer, fields: Sequence[str]) -> None:
    """Raises UserError for options that exclude each other, before images are read."""
    size = tokenizer.settings["image_size"]
    given = options.data.image_size
    if given % tokenizer.model.downsampling or given != size:
        raise UserError(
            f"data.image_size={given}: the image tokenizer was trained on {size} pixels; "
            f"choose the same image_tokenizer as its run, or data.image_size={size}"
        )
    if options.rows.format == StoreFormat.cogview and len(fields) > 1:
        raise UserError(
            f"token_store.format=cogview: its rows hold one text, template.layout has {', '.join(fields)}; "
            "set token_store.format=native"
        )
