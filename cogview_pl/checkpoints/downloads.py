"""Released files in a folder of downloads.

What a file is follows from its content: the image tokenizer from the names of its tensors, a text model from the fact
that SentencePiece opens it, and both must have the vocabulary of the transformer. The three transformers have the same
shapes, so only their names tell them apart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cogview_pl.checkpoints.ranks import LATEST, RANK_FILE
from cogview_pl.checkpoints.released import is_transformer_state, is_vqvae_state, transformer_sizes, vqvae_settings_of
from cogview_pl.checkpoints.safe_pickle.load import is_file, read_pt
from cogview_pl.errors import UserError
from cogview_pl.vocab import TextTokenizer, Vocabulary

_ROLES = {"init_from": {"base"}, "upscale_with": {"sr", "super"}, "rerank_with": {"caption", "captioner"}}
"""Key → words of the name of its transformer."""
_DEPTH = 3  # levels of folders that are searched
_MOST_FOLDERS = 1000
_WEIGHTS = (".pt", ".pth")
_TEXT = ".model"
_OURS = (".cogview_pl.json", "weights.safetensors", "adapter.safetensors")  # marks of runs, models and adapters


@dataclass
class Downloads:
    """Released files in a folder, and files that cannot be read, with the reason."""

    folder: Path
    transformers: list[Path] = field(default_factory=list)
    image_tokenizers: list[Path] = field(default_factory=list)
    text_models: list[Path] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def find_downloads(folder: Path) -> Downloads:
    """Look for released files in a folder and below it, in at most 1,000 folders of three levels."""
    found = Downloads(folder)
    for path in _candidates(folder):
        if path.is_dir():
            found.transformers.append(path)
        elif path.suffix == _TEXT:
            found.text_models.append(path)
        else:
            _sort_in(path, found)
    return found


def transformer_for(key: str, downloads: Downloads) -> Path | None:
    """The transformer of a role among downloads; None if they hold no transformer.

    Args:
        key: `init_from`, `upscale_with` or `rerank_with`.
        downloads: what was found.

    Raises:
        UserError: several have the name of the role, or none of several has.
    """
    every = downloads.transformers
    named = [path for path in every if role_of(path) == key]
    if len(named) == 1:
        return named[0]
    unnamed = [path for path in every if role_of(path) is None]
    if not named and len(unnamed) == 1:
        return unnamed[0]
    if not every:
        return None
    names = ", ".join(str(path.relative_to(downloads.folder)) for path in every)
    wanted = "cogview-" + min(_ROLES[key], key=len)
    raise UserError(
        f"{key}={downloads.folder} holds {names}, and their names do not tell which one is {wanted}; give that folder "
        f"itself, as {key}={downloads.folder}/FOLDER"
    )


def role_of(path: Path) -> str | None:
    """The key that a released transformer is made for, by the words of its name; None if the name does not tell."""
    words = set(re.split(r"[^a-z]+", path.name.removesuffix(path.suffix if path.suffix in _WEIGHTS else "").lower()))
    keys = [key for key, names in _ROLES.items() if names & words]
    return keys[0] if len(keys) == 1 else None


def tokenizers_for(
    transformer: Path, key: str, folder: Path, *, text: Path | None, images: Path | None
) -> tuple[Path | None, Path | None]:
    """Files of the text model and of the image tokenizer that a released transformer was trained with.

    Args:
        transformer: folder or file of the transformer.
        key: config key that error messages name.
        folder: where to look.
        text, images: files that are known; they are not looked for.

    Returns:
        Text model and image tokenizer; None for one that is not in the folder.

    Raises:
        UserError: several files fit, or there are several and none of them fits.
    """
    found = find_downloads(folder)
    texts = found.text_models if text is None else [text]
    tokenizers = found.image_tokenizers if images is None else [images]
    pairs = [(one, other) for one in texts for other in tokenizers]
    if len(pairs) > 1:  # else the vocabulary is compared when the weights are read
        size = transformer_sizes(transformer, key)["vocab_size"]
        pairs = [pair for pair in pairs if _rows(*pair) == size]
        if not pairs:
            raise UserError(
                f"{key}={transformer} has a vocabulary of {size} rows, and no text model with an image tokenizer in "
                f"{folder} makes so many; give the tokenizers that the weights were trained with, as text.model and "
                "image_tokenizer.path"
            )
        texts, tokenizers = (sorted(set(files)) for files in zip(*pairs, strict=True))
    return _only(texts, "text.model", folder), _only(tokenizers, "image_tokenizer.path", folder)


def _only(files: Sequence[Path], key: str, folder: Path) -> Path | None:
    """The only file, None of none; raises UserError naming the key that chooses one of several."""
    if len(files) > 1:
        names = ", ".join(str(file) for file in files[:4])
        raise UserError(f"{folder} holds several files for {key}: {names}; set {key} to one of them")
    return files[0] if files else None


def _rows(text: Path, images: Path) -> int | None:
    """Rows of the table of embeddings with these tokenizers; None if a file is none."""
    try:
        codes = vqvae_settings_of(images)["codebook_size"]
        return Vocabulary(codes, TextTokenizer.load(text).vocab_size).size
    except UserError:
        return None


def _sort_in(file: Path, found: Downloads) -> None:
    """Put a `.pt` file where its tensors belong."""
    try:
        state = read_pt(file, "weights", verify=False)
    except UserError as error:
        found.unreadable.append(str(error))
        return
    if is_vqvae_state(state):
        found.image_tokenizers.append(file)
    elif is_transformer_state(state):
        found.transformers.append(file)


def _candidates(folder: Path) -> Iterator[Path]:
    """Folders of transformers, and files that may be released ones."""
    seen = 0
    for place, folders, files in os.walk(folder, followlinks=True):
        here = Path(place)
        seen += 1
        if RANK_FILE.format(0) in files or is_file(here / LATEST):
            folders.clear()
            yield here
            continue
        ours = any(name in files for name in _OURS)
        if ours or seen > _MOST_FOLDERS or len(here.relative_to(folder).parts) >= _DEPTH:
            folders.clear()
        if ours:
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.endswith((*_WEIGHTS, _TEXT)):
                yield here / name
