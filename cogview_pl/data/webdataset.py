"""WebDataset shards (tar files of images and captions) as a data set with random access.

Other readers stream a tar file through a buffer for shuffling. Here the headers are read once, at construction, and the
place of each member (shard, offset, size) is kept; the data stay on disk. So an epoch is shuffled over the whole data
set, and a run that is resumed in the middle of an epoch continues with the next sample. The files must be local and
uncompressed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import BinaryIO

import numpy as np

from cogview_pl.data.captions import CaptionError, caption_lines, field_text, field_texts
from cogview_pl.data.config import Captions, Decoding
from cogview_pl.data.decoding.decode import SampleError
from cogview_pl.data.decoding.formats import IMAGE_EXTENSIONS
from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.images import OTHER_TEXT, ImageFileDataset, split_fractions
from cogview_pl.data.packed import packed
from cogview_pl.data.progress import NewProgress, Silent
from cogview_pl.data.shards.files import OpenFiles, expand_urls, files_of_split
from cogview_pl.data.shards.index import IMAGE, ShardIndex, shard_index
from cogview_pl.data.shards.tar_headers import NO_MEMBER, SEVERAL_IMAGES, SPARSE_MEMBER, Span
from cogview_pl.data.styles import check_present
from cogview_pl.durable.read import MAX_CAPTION, MAX_IMAGE, UnreadableError, cannot_be_read, require_size
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.vocab.roles import CAPTION

_LOOKED_AT = 32  # samples whose fields are looked at before a run starts


class ShardDataset(ImageFileDataset):
    """The samples of local WebDataset shards.

    The members of a sample share a key: their path up to the first dot of the base name, or up to the last dot where
    names have dots of their own (`shards/keys.py`). The image is the first member with an extension of
    `IMAGE_EXTENSIONS`. The caption is the field `caption_field` of `<key>.json` (of a list of texts the first counts),
    or all of `<key>.txt` where `caption_field` is "txt"; any other text is the field of its name in `<key>.json`. A
    sample that lacks one of them is `Skipped` when it is read. Workers may be forked or spawned: each process opens the
    shards at first use.

    Args:
        urls: local tar files, one or several; braces (`{000..003}`) and `*` are expanded.
        split: `train` or `val`.
        image_size: edge of the square images.
        val_fraction: share of `val`, 0 … 1, by a hash of the key (`split_fractions`); unused with `val_urls`.
        caption_field: see above.
        val_urls: shards of `val`; `train` then has all samples of `urls`.
        style_field: field of `<key>.json` with the name of the style.
        styles: the styles to keep; None keeps all. With styles, each `.json` is read at construction; a sample whose
            `.json` cannot be read is kept, and `Skipped` when it is read.
        style_patterns, min_size, text_fields, decoding, captions, caption_seed: see `ImageFileDataset`. With
            `captions=all` each caption is read at construction.
        progress: shows how much of the shards has been indexed.

    Raises:
        UserError: a pattern matches nothing or is remote, a shard is damaged, `urls` and `val_urls` overlap,
            there are no images, no sample has one of the fields, no sample of `urls` has one of the
            styles, or there are styles or patterns but no field; see also `ImageFileDataset`.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        split: str,
        image_size: int,
        val_fraction: float,
        caption_field: str,
        val_urls: str | Sequence[str] | None = None,
        *,
        style_field: str | None = None,
        styles: Sequence[str] | None = None,
        style_patterns: Sequence[str] = (),
        min_size: int = 0,
        text_fields: Sequence[str] = (CAPTION,),
        decoding: Decoding | None = None,
        captions: Captions | str = Captions.first,
        caption_seed: int = 0,
        progress: NewProgress = Silent,
    ) -> None:
        super().__init__(image_size, min_size, style_patterns, text_fields, decoding, captions, caption_seed)
        for name, given in (("style_patterns", style_patterns), ("styles", styles)):
            if given and style_field is None:
                raise UserError(
                    f"data.{name} is given without data.style_field; set that to the field of the .json that names "
                    "the style"
                )
        self.caption_field = caption_field
        self.style_field = style_field
        self._chosen_by = (split, val_fraction if val_urls is None else None, list(styles or ()))
        self._caption_extension = "txt" if caption_field == "txt" else "json"
        self._json_fields: list[tuple[str, str]] = []
        if style_field is not None and (styles or self.text_fields):
            self._json_fields.append(("data.style_field", style_field))
        self._json_fields += [(OTHER_TEXT, field) for field in self.text_fields if field != CAPTION]
        self.shards = expand_urls(urls, "data.urls")
        self._url_key = "data.urls"
        if val_urls is not None:
            self.shards, self._url_key = files_of_split(self.shards, expand_urls(val_urls, "data.val_urls"), split)
        self._files = OpenFiles()
        self._index = self._read_index(progress)
        self._rows = packed(np.arange(len(self._index)))
        self._check_fields()
        if styles:
            self._keep_styles(styles, must_have_all=split == "train" or val_urls is None)
        if val_urls is None:
            self._choose(split_fractions(self._index.fractions[self._rows], split, val_fraction))
        self._take_each_caption(self._choose)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        return self._index.key(self._rows[index])

    def _choose(self, indices: Sequence[int] | np.ndarray) -> None:
        """Keep some of the samples, in the given order."""
        self._rows = self._rows[np.asarray(indices, dtype=np.intp)]

    def notes(self) -> list[str]:
        txt = self._caption_extension == "txt"
        source = "the texts of the .txt members" if txt else f"the field {self.caption_field} of the .json members"
        captions = [f"captions are {source}"] if CAPTION in self.text_fields else []
        return [f"{self._url_key}: {note}" for note in captions + self._index.notes]

    def fingerprint(self) -> str:
        found = Fingerprint("shards")
        found.add(*self._settings(), self.caption_field, self.style_field, *self._chosen_by)
        for shard in self.shards:
            found.add_file(shard, shard.name)
        return found.hexdigest()

    def _read_index(self, progress: NewProgress) -> ShardIndex:
        extensions = {"json": None} if self._json_fields else {}
        if CAPTION in self.text_fields:
            extensions = {self._caption_extension: None} | extensions
        index = shard_index(self.shards, IMAGE_EXTENSIONS, list(extensions), progress)
        if not index.having(IMAGE, 1):
            raise UserError(
                f"{self._url_key}: no images in {self.shards[0]} … ({len(self.shards)} shards in all); members "
                f"must be named KEY.EXTENSION with one of {', '.join(IMAGE_EXTENSIONS)}"
            )
        return index

    def _keep_styles(self, styles: Sequence[str], must_have_all: bool) -> None:
        """Leave out the samples of other styles."""
        kept, found = [], set()
        for index in range(len(self)):
            SIGNALS.check()
            try:
                style = self._style(index)
            except SampleError:
                kept.append(index)
                continue
            found.add(style)
            if style in styles:
                kept.append(index)
        if must_have_all:
            check_present(styles, found, f"{self.style_field}")
        self._choose(kept)

    def _check_fields(self) -> None:
        """Raises UserError for a kind of file that no sample has, or a field that none of some samples has."""
        if CAPTION in self.text_fields and not self._index.having(self._caption_extension, 1):
            txt = self.caption_field == "txt"
            advice = "in .json, set it to a field of theirs" if txt else "in .txt, set data.caption_field=txt"
            raise UserError(
                f"data.caption_field={self.caption_field}: no sample has a .{self._caption_extension}, only "
                f"{', '.join(sorted(self._index.extensions))}; with captions {advice}"
            )
        wanted = list(self._json_fields)
        if CAPTION in self.text_fields and self._caption_extension == "json":
            wanted.insert(0, ("data.caption_field", self.caption_field))
        if not wanted:
            return
        samples = self._index.having("json", _LOOKED_AT)
        fields: dict[str, None] = {}  # in the order of the files
        for index in samples:
            with suppress(SampleError):
                fields |= dict.fromkeys(_json_object(self._member(index, "json")))
        missing = next(((key, field) for key, field in wanted if fields and field not in fields), None)
        if missing is not None:
            raise UserError(
                f"{missing[0]}={missing[1]}: no such field in the .json of {len(samples)} samples; "
                f"set it to one of: {', '.join(fields)}"
            )

    def _given_texts(self, index: int, field: str) -> list[str]:
        if field != CAPTION:
            return [self._json_text(index, field)]
        data = self._member(index, self._caption_extension)
        if self.caption_field == "txt":
            try:
                return caption_lines(data.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise CaptionError("the .txt is not UTF-8 text") from None
        record = _json_object(data)
        if self.caption_field not in record:
            raise CaptionError(f"the .json has no field {self.caption_field}")
        return field_texts(record[self.caption_field])

    def _style(self, index: int) -> str:
        return "" if self.style_field is None else self._json_text(index, self.style_field, "style")

    def _json_text(self, index: int, field: str, name: str = "") -> str:
        record = _json_object(self._member(index, "json"))
        return field_text(record.get(field), name or field)

    def _member(self, index: int, extension: str) -> bytes:
        shard, place = self._index.place(self._rows[index], extension)
        if place == NO_MEMBER:
            raise CaptionError(f"no .{extension} in the shard")
        return self._read(shard, place, f".{extension}", MAX_CAPTION)

    def _image(self, index: int) -> BinaryIO:
        self._require_image(index)
        shard, place = self._index.place(self._rows[index], IMAGE)
        return io.BytesIO(self._read(shard, place, "image", MAX_IMAGE))

    def _require_image(self, index: int) -> None:
        _, place = self._index.place(self._rows[index], IMAGE)
        if place == NO_MEMBER:
            raise SampleError("no image in the shard")
        if place == SEVERAL_IMAGES:
            raise SampleError(f"the shard has several images for this text, and none of them is {self.key(index)}.jpg")

    def _read(self, shard: int, place: Span, name: str, limit: int) -> bytes:
        if place == SPARSE_MEMBER:
            raise SampleError(f"the {name} is stored without its holes (a sparse member), which is not read")
        path = self.shards[shard]
        try:
            require_size(place.size, limit)
        except UnreadableError as error:
            raise SampleError(f"the {name} {error}") from None
        try:
            data = self._files.read(path, *map(int, place))
        except UnreadableError as error:
            raise SampleError(f"{path} {error}") from None
        except OSError as error:
            raise SampleError(f"{path} {cannot_be_read(error)}") from None
        if len(data) != place.size:
            raise SampleError(f"{path} has become shorter since the start")
        return data


def _json_object(data: bytes) -> dict[str, object]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise CaptionError("the .json is not valid JSON") from None
    if not isinstance(record, dict):
        raise CaptionError("the .json is not an object")
    return record
