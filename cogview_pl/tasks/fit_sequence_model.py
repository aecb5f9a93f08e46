"""task=pretrain and its relatives: train stage 2 on a token store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cogview_pl.checkpoints.store import (
    SEQUENCE_MODEL,
    ImageTokenizer,
    SequenceModel,
    build_template,
    save_sequence_model,
)
from cogview_pl.config import Config
from cogview_pl.data.codes import TokenStore
from cogview_pl.data.released import ReleasedFile, refuse_lmdb
from cogview_pl.data.sequences import SequenceCollator, SequenceDataset
from cogview_pl.errors import UserError
from cogview_pl.generation.pipeline import CogView
from cogview_pl.lit.data import DataModule
from cogview_pl.lit.sequence_model import SequenceModule
from cogview_pl.tasks.fit_image_tokenizer import plain, require_same
from cogview_pl.tasks.models import (
    check_positions,
    check_precision,
    layout_settings,
    open_image_tokenizer,
    open_sequence_model,
)
from cogview_pl.tasks.run_folder import RunFolder, predecessor
from cogview_pl.tasks.tokenize import IMAGE_TOKENIZER_FOLDER, STORE, TEXT_MODEL
from cogview_pl.tasks.training import optimizer_factory, seed, train
from cogview_pl.transformer import Transformer
from cogview_pl.vocab import CodeSlot, TextTokenizer, Vocabulary

_OF_THE_WEIGHTS = ("vocabulary_size", "num_layers", "width", "num_heads", "num_positions", "norm")
"""Settings in which a finetuned model must equal the one that it starts from."""

_LOGGED_PROMPTS = 64  # captions kept for the callbacks that paint during training


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Train the sequence model and write `model/`."""
    check_precision(config)
    seed(config)
    store, text, image_tokenizer = _open_store(config)
    vocabulary = Vocabulary(store.header.num_codes, text.num_pieces)
    template_settings = layout_settings(config, config.template)
    template = build_template(template_settings, vocabulary)
    settings = transformer_settings(config, vocabulary)
    check_positions(template, settings["num_positions"])
    model = _new_model(config, settings, vocabulary, text)
    loaded = SequenceModel(model, template, text, image_tokenizer, settings)
    module = SequenceModule(
        model,
        slot_names=[slot.name for slot in template.slots],
        optimizer=optimizer_factory(config.optimizer),
        painter=CogView(loaded) if isinstance(template.target, CodeSlot) else None,
        val_prompts=_captions(store, text, config.text.max_length),
    )
    data = DataModule(
        SequenceDataset(store.split("train"), template, store.header.grid),
        SequenceDataset(store.split("val"), template, store.header.grid),
        collate=SequenceCollator(vocabulary.pad),
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        seed=config.seed,
    )
    metrics = train(config, folder, module, data, {"kind": SEQUENCE_MODEL, "settings": settings})
    if module.global_rank == 0:
        save_sequence_model(
            folder / "model",
            model,
            transformer=settings,
            template=template_settings,
            vocabulary=vocabulary,
            text=text,
            image_tokenizer=image_tokenizer,
        )
    return metrics


def transformer_settings(config: Config, vocabulary: Vocabulary) -> dict[str, Any]:
    """Constructor arguments of the transformer, as plain values; raises UserError if sizes do not fit together."""
    width, heads = config.model.width, config.model.num_heads
    if width % heads:
        raise UserError(f"model.width={width} is not a multiple of model.num_heads={heads}; change one of them")
    return {"vocabulary_size": vocabulary.size, **plain(asdict(config.model))}


def _open_store(config: Config) -> tuple[TokenStore | ReleasedFile, TextTokenizer, ImageTokenizer]:
    """The training data, and the tokenizers that made them; an image tokenizer that the user names must be the same."""
    path = predecessor(config.outputs, "tokenize", "data.store", config.data.store)
    refuse_lmdb(path)
    if path.is_file():
        return _open_file(config, path)
    store = TokenStore.open(path / STORE)
    text = TextTokenizer.load(path / TEXT_MODEL)
    source = config.image_tokenizer.path or path / IMAGE_TOKENIZER_FOLDER
    image_tokenizer = open_image_tokenizer(config, source, "image_tokenizer.path")
    store.require(text_tokenizer=text.identity, image_tokenizer=image_tokenizer.identity)
    return store, text, image_tokenizer


def _open_file(config: Config, file: Path) -> tuple[ReleasedFile, TextTokenizer, ImageTokenizer]:
    """A data file of the original; it does not say which tokenizers made it."""
    if config.text.model is None or config.image_tokenizer.path is None:
        raise UserError(
            f"data.store={file} is a file without tokenizers; set text.model and image_tokenizer.path to those that "
            "made it, or give the folder of a run of task=tokenize"
        )
    text = TextTokenizer.load(config.text.model)
    image_tokenizer = open_image_tokenizer(config, config.image_tokenizer.path, "image_tokenizer.path")
    store = ReleasedFile.open(
        file,
        grid=image_tokenizer.grid,
        num_pieces=text.num_pieces,
        num_codes=image_tokenizer.model.num_codes,
        val_fraction=config.data.val_fraction,
    )
    return store, text, image_tokenizer


def _new_model(config: Config, settings: dict[str, Any], vocabulary: Vocabulary, text: TextTokenizer) -> Transformer:
    model = Transformer(**settings)
    if config.init_from is not None or config.starts_from is not None:
        path = predecessor(config.outputs, config.starts_from or "pretrain", "init_from", config.init_from)
        source = f"init_from={path}"
        start = open_sequence_model(config, path, "init_from", config.template)
        sizes = {"num_codes": vocabulary.num_codes, "num_pieces": vocabulary.num_pieces}
        require_same(start.settings["vocabulary"], sizes, source)
        if start.text.identity != text.identity:
            raise UserError(f"{source} was trained with another text tokenizer than the token store; tokenise with its")
        require_same(start.settings["transformer"], {key: settings[key] for key in _OF_THE_WEIGHTS}, source)
        model.load_state_dict(start.model.state_dict())
    return model


def _captions(store: TokenStore | ReleasedFile, text: TextTokenizer, max_length: int) -> list[str]:
    """The first captions for validation, cut as in training; those that then still make too long prompts are left out.

    (Pieces cut in the middle of a word, or unknown ones, may become more when their text is read again.)
    """
    rows = store.split("val")
    captions = [text.decode(rows[i][0][:max_length]) for i in range(min(len(rows), _LOGGED_PROMPTS))]
    return [caption for caption in captions if len(text.encode(caption)) <= max_length]
