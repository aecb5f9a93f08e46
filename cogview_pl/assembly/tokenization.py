"""Makes a token store from captioned images. It can resume, and lists images that cannot be read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogview_pl.assembly.image_data import image_inputs, open_images
from cogview_pl.assembly.image_encoding import ImageEncoder
from cogview_pl.assembly.joined_parts import (
    IMAGE_TOKENIZER_FOLDER,
    TEXT_MODEL,
    TOKEN_STORE,
    Lists,
    join_parts,
    part_folder,
)
from cogview_pl.checkpoints.model_folder import ImageTokenizer, save_image_tokenizer
from cogview_pl.data.bad_samples import BadSampleLog
from cogview_pl.data.config import DataConfig, StoreFormat, TokenStoreConfig
from cogview_pl.data.samples import CaptionedImages
from cogview_pl.data.sharing import Team
from cogview_pl.data.token_store.cogview_bin import TEXT_LENGTH
from cogview_pl.data.token_store.header import HEADER, TokenStoreHeader
from cogview_pl.data.token_store.parts import Part, part_of
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.lit.bars import status
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.vocab import TextTokenizer
from cogview_pl.vocab.config import TemplateConfig, TextConfig
from cogview_pl.vocab.roles import image_fields, text_fields

_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Tokenization:
    """Options of a token store: images, rows, text tokenizer, and the template that names texts and further images."""

    data: DataConfig
    rows: TokenStoreConfig
    text: TextConfig
    template: TemplateConfig
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
        team: the processes that encode images. The first one writes, or each one writes parts of its own.

    Returns:
        Counts and speed; empty in all processes but the first.

    Raises:
        UserError: the images, the tokenizers or an unfinished token store do not fit each other.
    """
    job = _Job(options, images, team)
    if not team.first:
        job.help(folder)
        return {}
    job.inputs = image_inputs(job.sources)
    parts = {"token_store.parts": options.rows.parts, "token_store.part": options.rows.part}
    run.require_same(parts, job.inputs, options.verify)
    job.text = text or _text_tokenizer(options.text, folder / TEXT_MODEL, _texts(job.sources["train"], job.fields))
    writer = job.writer(folder, options.rows.part)
    run.begin()
    job.text.save(folder / TEXT_MODEL)
    save_image_tokenizer(folder / IMAGE_TOKENIZER_FOLDER, images)
    lists = Lists.of(folder, options.data.max_skipped_share)
    seen_before = job.seen(folder)
    if not seen_before:
        _look_for_bad_samples(job.sources, lists.bad_samples)
    team.tell((job.text.serialized, job.inputs))
    started = time.perf_counter()
    header = job.make_and_join(writer, folder, lists) if job.in_parts else job.make(writer, lists)
    seen = job.seen(folder) - seen_before
    return {**lists.counts(header), "perf/images_per_s": seen / (time.perf_counter() - started)}


@dataclass
class _Job:
    """What all processes of a tokenisation know."""

    options: Tokenization
    images: ImageTokenizer
    team: Team

    def __post_init__(self) -> None:
        self.inputs: dict[str, str] = {}  # fingerprints of the data set
        self.text: TextTokenizer | None = None
        template = self.options.template
        self.fields = text_fields(template.layout)
        self.image_fields = image_fields(template.layout, template.target)
        _check(self.options, self.images, self.fields, self.image_fields)
        data = self.options.data.at_twice_the_size() if self.options.rows.large else self.options.data
        self.sources = {split: open_images(data, split, self.fields, self.image_fields) for split in _SPLITS}
        self.total = sum(map(len, self.sources.values()))

    @property
    def in_parts(self) -> bool:
        """Whether this run makes all parts of a token store and joins them."""
        return self.options.rows.parts is not None and self.options.rows.part is None

    def spans(self, number: int | None) -> tuple[Part | None, dict[str, range]]:
        """Part `number` and its samples by split; None: all samples."""
        samples = {split: len(source) for split, source in self.sources.items()}
        if number is None:
            return None, {split: range(count) for split, count in samples.items()}
        assert self.options.rows.parts is not None
        return part_of(number, self.options.rows.parts, samples, self.options.data.batch_size, self.inputs)

    def seen(self, folder: Path) -> int:
        """Number of samples that the token store in a folder, or those of its parts, have committed."""
        places = self._places(folder) if self.in_parts else [folder]
        stores = [place / TOKEN_STORE for place in places if (place / TOKEN_STORE / HEADER).exists()]
        return sum(split.next for store in stores for split in TokenStoreHeader.load(store).splits.values())

    def writer(self, folder: Path, number: int | None) -> TokenStoreWriter:
        """The writer of the token store in a folder, for part `number` or for all samples."""
        assert self.text is not None
        rows = self.options.rows
        cogview = rows.format == StoreFormat.cogview
        part, spans = self.spans(number)
        return TokenStoreWriter(
            folder / TOKEN_STORE,
            text_length=TEXT_LENGTH if cogview else self.options.text.max_length,
            grid=self.images.grid,
            text_vocab_size=self.text.vocab_size,
            codebook_size=self.images.model.codebook_size,
            text_tokenizer=self.text.identity,
            image_tokenizer=self.images.identity,
            splits={split: len(span) for split, span in spans.items()},
            format=rows.format.value,
            large=rows.large,
            text_fields=self.fields,
            image_fields=self.image_fields,
            cut=self.text.cut,
            part=part,
            commit_seconds=rows.commit_seconds,
        )

    def help(self, folder: Path) -> None:
        """Work for the first process, in another one."""
        serialized, self.inputs = self.team.tell((b"", self.inputs))
        self.text = TextTokenizer(serialized)
        if self.in_parts:
            self._make_parts(folder)
            return
        encoder = self._encoder(self.team)
        for split, span in self.spans(self.options.rows.part)[1].items():
            for _ in encoder.encoded(f"tokenize {split}", self.sources[split], span, self.team.tell(0)):
                pass

    def make(self, writer: TokenStoreWriter, lists: Lists) -> TokenStoreHeader:
        """Write one store, or one part; all processes of the team encode its batches."""
        return self._write(writer, self.options.rows.part, lists, self._encoder(self.team))

    def make_and_join(self, writer: TokenStoreWriter, folder: Path, lists: Lists) -> TokenStoreHeader:
        """Write all parts with the other processes, and join them in place of the store of `writer`."""
        self._make_parts(folder)
        return writer.header if writer.header.complete else join_parts(self._places(folder), folder, lists)

    def _make_parts(self, folder: Path) -> None:
        """Write the parts of this process; the first one waits for those of the others."""
        for _ in self.team.in_order(self._make_part, list(enumerate(self._places(folder), 1))):
            pass
        self.team.tell(None)  # nobody leaves before, because `Team.look` takes a closed connection for a death

    def _make_part(self, numbered: tuple[int, Path]) -> None:
        number, place = numbered
        place.mkdir(parents=True, exist_ok=True)
        lists = Lists.of(place, self.options.data.max_skipped_share)
        self._write(self.writer(place, number), number, lists, self._encoder(Team()))

    def _write(
        self, writer: TokenStoreWriter, number: int | None, lists: Lists, encoder: ImageEncoder
    ) -> TokenStoreHeader:
        """Write the samples that are not in the store, and finish it."""
        part, spans = self.spans(number)
        of = "" if part is None else f", part {part.number} of {part.count}"
        with writer:
            for split, span in spans.items():
                start = encoder.team.tell(writer.resume_index(split))
                for batch in encoder.encoded(f"tokenize {split}{of}", self.sources[split], span, start):
                    lists.bad_samples.note(batch.skipped)
                    lists.bad_samples.require_few(self.total)
                    lists.mended.add(batch.remarks)
                    next_index = writer.resume_index(split) + batch.seen
                    writer.append(
                        split, batch.text_tokens, batch.codes, batch.keys, next_index, batch.large, batch.others
                    )
        if not writer.header.complete:
            writer.finish()
        return writer.header

    def _encoder(self, team: Team) -> ImageEncoder:
        assert self.text is not None
        return ImageEncoder(
            self.options.data,
            self.images,
            self.text,
            self.fields,
            self.image_fields,
            self.options.rows.large,
            self.options.device,
            team,
            processes=self.team.size,
            look=self.team.look if self.in_parts else SIGNALS.check,
        )

    def _places(self, folder: Path) -> list[Path]:
        assert self.options.rows.parts is not None
        return [part_folder(folder, number) for number in range(1, self.options.rows.parts + 1)]


def _look_for_bad_samples(sources: Mapping[str, CaptionedImages], bad_samples: BadSampleLog) -> None:
    """List what is known to be bad; raises UserError if that, or a random probe, is too much."""
    total = sum(map(len, sources.values()))
    status("reading the captions …")
    for images in sources.values():
        bad_samples.note(images.known_bad())
    bad_samples.require_few(total)
    status("reading a probe of the images …")
    bad_samples.require_few_in_probe(sources["train"], SIGNALS.check)


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


def _check(
    options: Tokenization, tokenizer: ImageTokenizer, fields: Sequence[str], image_fields: Sequence[str]
) -> None:
    """Raises UserError for options that exclude each other, before images are read."""
    if options.rows.part is not None and options.rows.part > (options.rows.parts or 0):
        raise UserError(
            f"token_store.part={options.rows.part} is none of token_store.parts={options.rows.parts or 'null'}; set "
            "token_store.parts to the number of parts"
        )
    size = tokenizer.settings["image_size"]
    given = options.data.image_size
    if given % tokenizer.model.downsampling or given != size:
        raise UserError(
            f"data.image_size={given}: the image tokenizer was trained on {size} pixels; "
            f"choose the same image_tokenizer as its run, or data.image_size={size}"
        )
    if options.rows.format == StoreFormat.cogview and image_fields:
        raise UserError(
            f"token_store.format=cogview: its rows hold one image, template.layout has {', '.join(image_fields)} too; "
            "set token_store.format=native"
        )
    if options.rows.format == StoreFormat.cogview and len(fields) > 1:
        raise UserError(
            f"token_store.format=cogview: its rows hold one text, template.layout has {', '.join(fields)}; "
            "set token_store.format=native"
        )
