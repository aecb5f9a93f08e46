"""Joins the runs of the parts of a tokenisation: token stores, tokenizers, and lists of bad samples."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview_pl.checkpoints.model_folder import load_image_tokenizer, save_image_tokenizer
from cogview_pl.data.bad_samples import BadSampleLog, listed
from cogview_pl.data.mended import MendedLog
from cogview_pl.data.token_store.header import HEADER, TokenStoreHeader
from cogview_pl.data.token_store.joining import join, open_parts
from cogview_pl.durable.read import why_unusable
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.vocab import TextTokenizer

TOKEN_STORE = "token_store"
TEXT_MODEL = "text.model"
IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
_PARTS = "parts"
_SKIPPED = "skipped.jsonl"
_MENDED = "mended.jsonl"

_log = logging.getLogger(__name__)


def part_folder(folder: Path, number: int) -> Path:
    """Folder of a part of the token store that a run makes in parts."""
    return folder / _PARTS / str(number)


@dataclass(frozen=True)
class Lists:
    """The lists of bad and of mended samples in a folder; see `BadSampleLog` and `MendedLog`."""

    bad_samples: BadSampleLog
    mended: MendedLog

    @classmethod
    def of(cls, folder: Path, max_skipped_share: float) -> Lists:
        """Open the lists of a folder; raises UserError if they cannot be read."""
        return cls(BadSampleLog(folder / _SKIPPED, max_skipped_share), MendedLog(folder / _MENDED))

    def add(self, folders: Iterable[Path]) -> None:
        """Take in the lists of other folders, in order."""
        for folder in folders:
            self.bad_samples.note(listed(folder / _SKIPPED))
            self.mended.add({sample.key: sample.reason for sample in listed(folder / _MENDED)})

    def counts(self, header: TokenStoreHeader) -> dict[str, float]:
        """Metrics of a finished token store."""
        if self.mended.count:
            _log.info("%s", self.mended.summary())
        return {
            **{f"tokenize/rows_{name}": split.rows for name, split in header.splits.items()},
            "tokenize/captions_cut": sum(split.truncated for split in header.splits.values()),
            "tokenize/skipped": self.bad_samples.count,
            "tokenize/mended": self.mended.count,
            "tokenize/text_vocab_size": header.text_vocab_size,
        }


def join_parts(folders: Sequence[Path], folder: Path, lists: Lists) -> TokenStoreHeader:
    """Join the token stores and lists of parts.

    Args:
        folders: of the runs of the parts, in any order.
        folder: existing folder of the joined store.
        lists: of the joined store.

    Raises:
        UserError: parts do not fit together, or too many samples of all parts are bad.
    """
    stores = open_parts([place / TOKEN_STORE for place in folders])
    lists.add(store.folder.parent for store in stores)
    lists.bad_samples.require_few(sum(split.source for store in stores for split in store.header.splits.values()))
    return join(stores, folder / TOKEN_STORE)


def join_runs(given: Any, max_skipped_share: float, run: RunFolder) -> dict[str, float]:
    """Join the parts that `token_store.join` names in a new run; returns counts.

    Args:
        given: a list of run folders, or a folder.
        max_skipped_share: largest share of bad samples in all parts.
        run: the new run.

    Raises:
        UserError: parts are missing or do not fit together, their tokenizers are damaged, or too many samples are bad.
    """
    folders = _folders(given)
    stores = open_parts([folder / TOKEN_STORE for folder in folders])
    home = stores[0].folder.parent
    text = TextTokenizer.load(home / TEXT_MODEL)
    images = load_image_tokenizer(home / IMAGE_TOKENIZER_FOLDER, "token_store.join")
    stores[0].require(text_tokenizer=text.identity, image_tokenizer=images.identity)
    run.begin()
    lists = Lists.of(run.path, max_skipped_share)
    header = join_parts(folders, run.path, lists)
    text.save(run / TEXT_MODEL)
    save_image_tokenizer(run / IMAGE_TOKENIZER_FOLDER, images)
    return lists.counts(header)


def _folders(given: Any) -> list[Path]:
    """The run folders that a value of `token_store.join` names."""
    found: list[Path] = []
    for folder in [given] if isinstance(given, str) else list(given):
        path = Path(str(folder))
        inside = sorted(header.parent.parent for header in path.glob(f"*/{TOKEN_STORE}/{HEADER}"))
        if (path / TOKEN_STORE / HEADER).exists():
            found.append(path)
        elif inside:
            found += inside
        else:
            reason = "holds no token store" if path.is_dir() else why_unusable(path)
            raise UserError(
                f"token_store.join: {path} {reason}; give the run folder of each part, or the folder of all"
            )
    return found
