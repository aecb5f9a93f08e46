"""What stage 2 trains on: a token store with its tokenizers, laid out by a template, maybe with others mixed in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from cogview_pl.assembly.models import open_image_tokenizer
from cogview_pl.checkpoints.model_folder import ImageTokenizer, SequenceModel
from cogview_pl.config.parts import model_options
from cogview_pl.config.schema import Config
from cogview_pl.data.config import TokenSource
from cogview_pl.data.mixing import mixed
from cogview_pl.data.sequence_dataset import SequenceDataset
from cogview_pl.data.token_store.cogview_bin import ReleasedFile, refuse_lmdb
from cogview_pl.data.token_store.rows import StoredRows, WithoutText
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.data.window_dataset import WindowDataset
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import RunFolder, predecessor
from cogview_pl.tasks.tokenize import IMAGE_TOKENIZER_FOLDER, STORE, TEXT_MODEL, tokenise
from cogview_pl.vocab import CodeSlot, Sequence, Template, TextSlot, TextTokenizer

_MIX_STORE = "sequences.replay_store"
_TOKENS = "tokens"  # folder of a store that a training run makes for itself


@dataclass(frozen=True)
class Tokens:
    """A token store, the tokenizers that made it, and what was counted on the way."""

    store: TokenStore | ReleasedFile
    text: TextTokenizer
    image_tokenizer: ImageTokenizer
    metrics: dict[str, float]
    inputs: dict[str, str]
    """Hash of the token store, for a run that goes on."""


def open_tokens(config: Config, folder: RunFolder, start: SequenceModel | None) -> Tokens:
    """`data.token_store`, the newest store, or one made from `data` on the spot with the tokenizers of `start`.

    Raises:
        UserError: there is none, or its tokenizers are others than those that the configuration names.
    """
    metrics: dict[str, float] = {}
    if config.data.token_store is None and config.sequences.source == TokenSource.images:
        path = folder / _TOKENS
        with folder.processes.first_goes_ahead() as first:
            if first:
                path.mkdir(exist_ok=True)
                metrics = tokenise(config, folder, path, start)
    else:
        path = predecessor(config.outputs, "tokenize", "data.token_store", config.data.token_store)
    refuse_lmdb(path)
    if path.is_file():
        return _open_file(config, path)
    store = TokenStore.open(path / STORE)
    text = TextTokenizer.load(path / TEXT_MODEL)
    source = config.image_tokenizer.path or path / IMAGE_TOKENIZER_FOLDER
    image_tokenizer = open_image_tokenizer(model_options(config), source, "image_tokenizer.path")
    store.require(text_tokenizer=text.identity, image_tokenizer=image_tokenizer.identity)
    inputs = {"data.token_store": store.fingerprint()}
    return Tokens(store, text, image_tokenizer, metrics, inputs)


def _open_file(config: Config, file: Path) -> Tokens:
    """A data file of the original; it does not say which tokenizers made it."""
    if config.text.model is None or config.image_tokenizer.path is None:
        raise UserError(
            f"data.token_store={file} is a file without tokenizers; set text.model and image_tokenizer.path to those "
            "that made it, or give the folder of a run of task=tokenize"
        )
    text = TextTokenizer.load(config.text.model)
    image_tokenizer = open_image_tokenizer(model_options(config), config.image_tokenizer.path, "image_tokenizer.path")
    store = ReleasedFile.open(
        file,
        grid=image_tokenizer.grid,
        text_vocab_size=text.vocab_size,
        codebook_size=image_tokenizer.model.codebook_size,
        val_fraction=config.data.val_fraction,
    )
    inputs = {"data.token_store": store.fingerprint()}
    return Tokens(store, text, image_tokenizer, {}, inputs)


def training_sequences(config: Config, tokens: Tokens, template: Template) -> Dataset[Sequence]:
    """The training split, laid out, with other samples mixed in as `sequences` says."""
    rows = tokens.store.split("train")
    found = _laid_out(rows, template, training=True)
    options = config.sequences
    if options.replay_share:
        found = mixed(found, _laid_out(_other_rows(config, tokens), template, training=True), options.replay_share)
    if options.conditioning_dropout:
        if not any(isinstance(slot, TextSlot) and slot != template.target for slot in template.slots):
            raise UserError(
                "sequences.conditioning_dropout: this layout has no text in front of its target; set it to 0"
            )
        found = mixed(found, _laid_out(WithoutText(rows), template, training=True), options.conditioning_dropout)
    return found


def validation_sequences(tokens: Tokens, template: Template) -> Dataset[Sequence]:
    """The validation split, laid out."""
    return _laid_out(tokens.store.split("val"), template, training=False)


def _laid_out(rows: StoredRows | WithoutText, template: Template, *, training: bool) -> Dataset[Sequence]:
    if sum(isinstance(slot, CodeSlot) for slot in template.slots) > 1:
        return WindowDataset(rows, template, every=training)
    return SequenceDataset(rows, template, rows.layout.grid)


def mixed_in(config: Config) -> dict[str, str]:
    """Hash of the token store whose samples are mixed in, if there is one.

    Raises:
        UserError: there is none, and one is wanted.
    """
    return {_MIX_STORE: _other_store(config).fingerprint()} if config.sequences.replay_share else {}


def _other_store(config: Config) -> TokenStore:
    path = predecessor(config.outputs, "tokenize", _MIX_STORE, config.sequences.replay_store)
    return TokenStore.open(path / STORE)


def _other_rows(config: Config, tokens: Tokens) -> StoredRows:
    store = _other_store(config)
    store.require(text_tokenizer=tokens.text.identity, image_tokenizer=tokens.image_tokenizer.identity)
    return store.split("train")
