"""How a folder keeps its captions: which layout it has, and the images with their texts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from cogview_pl.data.image_folders import caption_files, chinese_clip
from cogview_pl.data.image_folders.advice import for_a_file, no_captions, no_images, with_columns
from cogview_pl.data.image_folders.file_names import FileNames
from cogview_pl.data.image_folders.listed import Fields, Listed
from cogview_pl.data.image_folders.listed_images import ListedImages
from cogview_pl.data.image_folders.listings import Listing, read_listing
from cogview_pl.data.image_folders.walk import FolderFiles, walk
from cogview_pl.data.packed import is_among
from cogview_pl.data.progress import NewProgress, Silent
from cogview_pl.durable.read import UnreadableError, find, kind_of, require_file
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.vocab.roles import CAPTION

LISTINGS = (
    "metadata.jsonl",
    "captions.jsonl",
    "metadata.csv",
    "captions.csv",
    "metadata.tsv",
    "captions.tsv",
)
"""Lists that count before text files beside the images; the first that exists is read."""
_JSON = ("metadata.json", "captions.json")
"""Lists that are looked for when no image has a text file."""


@dataclass
class FolderContent:
    """The images of a folder with their texts, and what to say of them."""

    images: ListedImages
    notes: list[str]


def read_folder(
    root: Path, fields: Fields, listing: str | None, name: str, progress: NewProgress = Silent
) -> FolderContent:
    """The images of a folder with their texts.

    Args:
        root: the folder.
        fields: which fields of a list count; without texts, images alone.
        listing: file with the captions, relative to the working folder or to `root`; None looks for one.
        name: the configuration key of `root`, for messages.
        progress: shows how many files were found and read.

    Raises:
        UserError: the folder is missing, cannot be read, or has no captions; a list is malformed, or none of its lines
            or images can be used.
    """
    require_folder(root, name)
    given = _given_listing(root, listing) if listing is not None else _first_listing(root, LISTINGS)
    files = walk(root, progress, all_readable=given is None)
    source = _Source(root, fields, name, files, progress)
    if given is not None:
        return source.of_listing(given)
    if not fields.texts:
        return source.alone()
    return source.of_caption_files(".txt") or source.of_other_layouts()


@dataclass
class _Source:
    """Reads the captions of a folder in one layout."""

    root: Path
    fields: Fields
    name: str
    files: FolderFiles
    progress: NewProgress

    def of_listing(self, file: Path, also: Sequence[str] = ()) -> FolderContent:
        """The images of a list; `also` are files that belong to it."""
        inside = os.path.relpath(file, self.root)
        prefix = os.path.dirname(inside)
        names = FileNames(self.root, self.files.images, "" if prefix.startswith("..") else prefix)
        listing = read_listing(file, self.fields)
        if all(one.problem for one in listing.texts):
            raise UserError(with_columns(listing.texts[0].problem, file, self.fields, names, self.files.images))
        texts = listing.texts
        texts.rename(names.find)
        _require_one(texts, self.root, file, self.name)
        notes = [f"{_captions_said(listing, self.fields)}{inside}{f' ({listing.how})' * bool(listing.how)}"]
        notes += names.notes()
        notes += self._left_out([inside, *also], texts)
        return self._content(texts, notes)

    def alone(self) -> FolderContent:
        """The images, whatever captions they have."""
        archives = [] if self.files.images else chinese_clip.archives(self.files.others)
        if archives:
            return self.of_archive(archives)
        if not self.files.images:
            raise UserError(no_images(self.root, self.name, self.files))
        texts = ListedImages(map(Listed, self.files.images))
        captions = caption_files.beside(self.files.images, self.files.others, ".txt").values()
        return self._content(texts, self._left_out(captions, texts))

    def of_caption_files(self, extension: str) -> FolderContent | None:
        """The captions in files beside the images; None where there are none."""
        files = caption_files.beside(self.files.images, self.files.others, extension)
        return self._of_files(files, f"{extension} files", "beside the images") if files else None

    def of_other_layouts(self) -> FolderContent:
        """The captions in any other layout."""
        found = self.of_caption_files(".caption")
        if found is None:
            files = caption_files.in_another_folder(self.files.images, self.files.others)
            found = self._of_files(files, "text files", "in another folder") if files else None
        if found is None and (listing := self._nested_listing()) is not None:
            found = self.of_listing(self.root / listing)
        if found is None and (archives := chinese_clip.archives(self.files.others)):
            found = self.of_archive(archives)
        if found is None:
            raise UserError(no_captions(self.root, self.name, self.files, LISTINGS))
        return found

    def of_archive(self, archives: Sequence[str]) -> FolderContent:
        """The images of the first of several archives in the form of Chinese-CLIP."""
        texts = chinese_clip.read_archive(self.root, archives[0], bool(self.fields.texts), self.progress)
        if not texts:
            raise UserError(f"{self.root / archives[0]} holds no images; give one per line: id, tab, base64")
        listed = archives[0].removesuffix(chinese_clip.IMAGES) + chinese_clip.TEXTS
        notes = [f"images of {archives[0]}, captions of {listed}", *self._left_out([archives[0], listed])]
        return self._content(texts, notes)

    def _of_files(self, files: dict[str, str], kind: str, place: str) -> FolderContent:
        self._require_captions_alone(kind)
        found = caption_files.read_caption_files(self.root, self.files.images, files, self.progress)
        problems = [one.problem for one in found.texts if one.problem]
        if len(problems) == len(files):
            raise UserError(f"{self.root}/{problems[0]}")
        lacking = len(self.files.images) - len(files)
        notes = [
            f"captions are the {kind} {place}" + (f" (GB18030: {found.num_gb18030:,})" if found.num_gb18030 else "")
        ]
        if lacking:
            have = "has" if lacking == 1 else "have"
            notes.append(f"{lacking:,} of {len(self.files.images):,} images {have} no caption and will be skipped")
        return self._content(found.texts, notes + self._left_out(files.values(), found.texts))

    def _require_captions_alone(self, kind: str) -> None:
        """Raises UserError where text files cannot give what is asked for."""
        if self.fields.style is not None:
            raise UserError(
                f"data.style_field={self.fields.style}: {self.name}={self.root} has its captions in {kind}, which "
                "have no fields; set data.styles to one folder per style"
            )
        if self.fields.texts != (CAPTION,):
            raise UserError(
                f"template.layout: {self.name}={self.root} has its captions in {kind}, which have no columns "
                f"{', '.join(self.fields.texts)}; write a {LISTINGS[0]}"
            )

    def _nested_listing(self) -> str | None:
        """A list in the root, or in one of its folders (`train/metadata.jsonl`, `annotations/captions_train.json`)."""
        for file in _JSON:
            if file in self.files.others:
                return file
        lists = [file for file in self.files.others if file.count("/") == 1 and _is_listing(file)]
        training = [file for file in lists if "train" in file]
        chosen = training or lists
        if len(chosen) > 1:
            raise UserError(
                f"{self.name}={self.root} has several lists: {', '.join(chosen)}; set data.listing to one of them"
            )
        return chosen[0] if chosen else None

    def _left_out(self, used: Iterable[str], images: ListedImages | None = None) -> list[str]:
        """What of the folder is not used, in one line.

        Args:
            used: files that were read.
            images: images that were listed.
        """
        found = self.files.left_out
        listed = (images.files[index] for index in range(len(images))) if images is not None else ()
        files = [*self.files.images, *self.files.others]
        unused = np.flatnonzero(~is_among(files, map(self._relative, chain(used, listed))))
        for file in (files[index] for index in unused if index < len(self.files.images)):
            found.add(f"{os.path.splitext(file)[1].lower()} that no list names", file)
        others = [files[index] for index in unused if index >= len(self.files.images)]
        others = [file for file in others if self.fields.texts or not _is_captions(file)]
        beside = is_among(map(_stem, others), map(_stem, self.files.images)) if others else ()
        for file, is_beside in zip(others, beside, strict=True):
            kind = os.path.splitext(file)[1].lower() or "without extension"
            found.add(f"{kind} beside images" if is_beside else kind, file)
        return [line] if (line := found.line()) else []

    def _relative(self, file: str) -> str:
        return os.path.relpath(file, self.root) if os.path.isabs(file) else file

    def _content(self, texts: ListedImages, notes: Iterable[str]) -> FolderContent:
        return FolderContent(texts, [f"{self.name}={self.root}: {note}" for note in notes])


def _captions_said(listing: Listing, fields: Fields) -> str:
    if not fields.texts:
        return "images are those of "
    return f"captions are the field {listing.caption} of " if listing.caption else "texts are those of "


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]


def _is_listing(file: str) -> bool:
    base = os.path.basename(file)
    return base in (*LISTINGS, *_JSON) or (base.startswith("captions") and base.endswith(".json"))


def _is_captions(file: str) -> bool:
    return file.lower().endswith(caption_files.EXTENSIONS) or _is_listing(file)


def require_folder(root: Path, name: str) -> None:
    """Raises UserError naming the key unless a path is a folder."""
    try:
        found = find(root)
    except UnreadableError as error:
        raise UserError(f"{name}={root} {error}; set it to a folder of images with captions") from None
    if found is None or kind_of(found) != "a folder":
        state = "does not exist" if found is None else "is not a folder"
        raise UserError(f"{name}={root} {state}; {for_a_file(root)}")


def _given_listing(root: Path, listing: str) -> Path:
    places = [Path(os.path.expanduser(listing)), root / listing]
    for file in places:
        try:
            require_file(file)
        except UnreadableError as error:
            if not error.missing:
                raise UserError(f"data.listing={listing} {error}; give a file with images and captions") from None
        else:
            return file
    raise UserError(f"data.listing={listing} does not exist, nor {places[1]}; give a file with images and captions")


def _first_listing(root: Path, names: Sequence[str]) -> Path | None:
    """The file with the captions of a folder, if there is one."""
    for file in names:
        try:
            require_file(root / file)
        except UnreadableError as error:
            if not error.missing:
                raise UserError(f"{root / file} {error}; mend or remove it") from None
        else:
            return root / file
    return None


def _require_one(texts: Sequence[Listed], root: Path, listing: Path, name: str) -> None:
    """Raises UserError if none of the listed images can be opened."""
    unreadable, count, first = "", 0, ""
    for image in (one for one in texts if not one.problem):
        count, first = count + 1, first or image.file
        SIGNALS.check()
        try:
            require_file(root / image.file)
        except UnreadableError as error:
            if not error.missing and not unreadable:
                unreadable = f"{root / image.file} {error}"
        else:
            return
    if unreadable:
        raise UserError(f"{listing}: none of the {count} listed images can be read; {unreadable}")
    raise UserError(
        f"{listing}: none of the {count} listed images exists, the first is {root / first}; "
        f"give files relative to {name}"
    )
