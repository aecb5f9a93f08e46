"""Training data of stage 2: a token store with its tokenizers, and its sequences in the layout of a template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cogview_pl.assembly.joined_parts import IMAGE_TOKENIZER_FOLDER, TEXT_MODEL, TOKEN_STORE
from cogview_pl.assembly.models import newest_image_tokenizer, open_image_tokenizer
from cogview_pl.assembly.options import ModelOptions
from cogview_pl.assembly.tokenization import Tokenization, tokenise
from cogview_pl.checkpoints.model_folder import ImageTokenizer, SequenceModel
from cogview_pl.data.config import SequencesConfig, TokenSource
from cogview_pl.data.mixing import mixed
from cogview_pl.data.sequence_dataset import SequenceDataset, fields_of_slots, require_images
from cogview_pl.data.sharing import Team
from cogview_pl.data.token_store.cogview_bin import ReleasedFile, refuse_lmdb
from cogview_pl.data.token_store.rows import TokenRows, WithoutText
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.data.window_dataset import WindowDataset
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import RunFolder, predecessor
from cogview_pl.vocab import CodeSlot, Sequence, Template, TextSlot, TextTokenizer, source_slots
from cogview_pl.vocab.roles import image_fields

_REPLAY = "sequences.replay_store"
_TOKENS = "tokens"  # folder of a token store that a training run makes for itself


@dataclass(frozen=True)
class Tokens:
    """A token store with the tokenizers that made it."""

    store: TokenStore | ReleasedFile
    text: TextTokenizer
    image_tokenizer: ImageTokenizer
    metrics: dict[str, float]
    """Counts of tokenising; empty if this run did not tokenise."""
    inputs: dict[str, str]
    """Hash of the token store; a resumed run compares it."""


def open_tokens(
    options: Tokenization,
    sequences: SequencesConfig,
    models: ModelOptions,
    folder: RunFolder,
    start: SequenceModel | None,
) -> Tokens:
    """`data.token_store`, the newest token store, or one that is made from `data` with the tokenizers of `start`.

    Raises:
        UserError: there is no token store, or it was made with other tokenizers than the configuration names.
    """
    metrics: dict[str, float] = {}
    given = options.data.token_store
    if given is None and sequences.source == TokenSource.images:
        path = folder / _TOKENS
        with folder.processes.first_goes_ahead() as first:
            if first:
                path.mkdir(exist_ok=True)
                images = start.image_tokenizer if start else newest_image_tokenizer(models)
                metrics = tokenise(options, images, start.text if start else None, folder, path, Team())
    else:
        path = predecessor(models.outputs, "tokenize", "data.token_store", given)
    refuse_lmdb(path)
    if path.is_file():
        return _open_file(path, models, sequences.val_fraction)
    store = TokenStore.open(path / TOKEN_STORE)
    text = TextTokenizer.load(path / TEXT_MODEL)
    images_path = models.image_tokenizer.path or path / IMAGE_TOKENIZER_FOLDER
    image_tokenizer = open_image_tokenizer(models, images_path, "image_tokenizer.path")
    store.require(text_tokenizer=text.identity, image_tokenizer=image_tokenizer.identity)
    inputs = {"data.token_store": store.fingerprint()}
    return Tokens(store, text, image_tokenizer, metrics, inputs)


def _open_file(file: Path, models: ModelOptions, val_fraction: float) -> Tokens:
    """A data file of the released program; it does not name its tokenizers."""
    if models.text.model is None or models.image_tokenizer.path is None:
        raise UserError(
            f"data.token_store={file} is a file without tokenizers; set text.model and image_tokenizer.path to the "
            "tokenizers that made it, or give the folder of a run of task=tokenize"
        )
    text = TextTokenizer.load(models.text.model)
    image_tokenizer = open_image_tokenizer(models, models.image_tokenizer.path, "image_tokenizer.path")
    store = ReleasedFile.open(
        file,
        grid=image_tokenizer.grid,
        text_vocab_size=text.vocab_size,
        codebook_size=image_tokenizer.model.codebook_size,
        val_fraction=val_fraction,
    )
    inputs = {"data.token_store": store.fingerprint()}
    return Tokens(store, text, image_tokenizer, {}, inputs)


def training_sequences(tokens: Tokens, template: Template, options: SequencesConfig, outputs: str) -> Dataset[Sequence]:
    """The training split in the layout of a template, mixed with replayed and text-free samples by `sequences`."""
    rows = tokens.store.split("train")
    found = _laid_out(rows, template, training=True)
    if options.replay_share:
        require_replay(options, outputs, tokens.text, tokens.image_tokenizer)
        store = _replay_store(options, outputs)
        found = mixed(found, _laid_out(store.split("train"), template, training=True), options.replay_share)
    if options.conditioning_dropout:
        if not any(isinstance(slot, TextSlot) and slot != template.target for slot in template.slots):
            raise UserError("sequences.conditioning_dropout: this layout has no text before its target; set it to 0")
        empty = WithoutText(rows, keep=template.target.name)
        found = mixed(found, _laid_out(empty, template, training=True), options.conditioning_dropout)
    return found


def validation_sequences(tokens: Tokens, template: Template) -> Dataset[Sequence]:
    """The validation split in the layout of a template."""
    return _laid_out(tokens.store.split("val"), template, training=False)


def validation_prompts(tokens: Tokens, template: Template, count: int) -> tuple[list[str], Tensor | None]:
    """Texts of the first `count` validation rows, cut to the length of the only text slot, with the codes of
    their source images `(B, y, x)`, where the layout takes them.

    A row is left out if tokenising its text again gives more tokens than the slot holds. This happens if the cut was in
    the middle of a word, or if tokens are unknown.
    """
    (slot,) = (slot for slot in template.slots if isinstance(slot, TextSlot))
    rows, text = tokens.store.split("val"), tokens.text
    field = fields_of_slots(template, rows.layout.text_fields)[slot.name]
    texts = {i: text.decode(rows[i][0][field][: slot.length]) for i in range(min(len(rows), count))}
    kept = {i: caption for i, caption in texts.items() if len(text.encode(caption)) <= slot.length}
    names = source_slots(template)
    if names is None:
        return list(kept.values()), None
    require_images(names[1:], rows.layout.image_fields)
    sources = [rows.others(i)[names[1]] for i in kept]
    return list(kept.values()), torch.stack(sources) if sources else None


def _laid_out(rows: TokenRows | WithoutText, template: Template, *, training: bool) -> Dataset[Sequence]:
    grids = sum(isinstance(slot, CodeSlot) for slot in template.slots)
    layout = rows.layout
    if grids > 1 and not image_fields(template.layout, template.target.name):
        return WindowDataset(rows, template, every=training)
    return SequenceDataset(rows, template, layout.grid, layout.text_fields, layout.image_fields)


def replay_inputs(options: SequencesConfig, outputs: str) -> dict[str, str]:
    """Hash of the token store that is replayed, if any; raises UserError if it is missing."""
    return {_REPLAY: _replay_store(options, outputs).fingerprint()} if options.replay_share else {}


def require_replay(
    options: SequencesConfig, outputs: str, text: TextTokenizer, image_tokenizer: ImageTokenizer
) -> None:
    """Raises UserError if the token store that is replayed, if any, was made with other tokenizers."""
    if options.replay_share:
        store = _replay_store(options, outputs)
        store.require(text_tokenizer=text.identity, image_tokenizer=image_tokenizer.identity)


def _replay_store(options: SequencesConfig, outputs: str) -> TokenStore:
    return TokenStore.open(predecessor(outputs, "tokenize", _REPLAY, options.replay_store) / TOKEN_STORE)
