"""Constructor arguments of the models that a configuration describes, and those of models that runs have left."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cogview_pl.assembly.models import layout_settings, starts_from_weights
from cogview_pl.checkpoints.adapter_folder import find_adapter, find_base, read_adapter_settings
from cogview_pl.checkpoints.model_folder import (
    IMAGE_TOKENIZER,
    SEQUENCE_MODEL,
    build_template,
    find_model_folder,
    read_model_settings,
)
from cogview_pl.checkpoints.released import is_released
from cogview_pl.checkpoints.settings import CONFIG, unfit_named
from cogview_pl.config.schema import Config
from cogview_pl.data.config import TokenSource
from cogview_pl.data.token_store.header import TokenStoreHeader
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import predecessor
from cogview_pl.vocab import Template, TextTokenizer, Vocabulary
from cogview_pl.vocab.config import TemplateConfig
from cogview_pl.vqvae.config import ImageTokenizerConfig

_TRAINING_KEYS = ("path", "image_size", "grid", "reconstruction", "reconstruction_weight", "quantize_after_steps")


@dataclass(frozen=True)
class ImageSizes:
    """An image tokenizer: constructor arguments, and the edge of its images."""

    settings: dict[str, Any]
    edge: int

    @property
    def grid(self) -> tuple[int, int]:
        """`(y, x)` codes of a image."""
        codes = self.edge // self.settings["downsampling"]
        return codes, codes


@dataclass(frozen=True)
class SequenceSizes:
    """A sequence model: constructor arguments, its layout, and its image tokenizer."""

    settings: dict[str, Any]
    template: Template
    images: ImageSizes
    text_model: Path | None = None
    """Its SentencePiece file, of a model that is there already."""


def vqvae_settings(config: ImageTokenizerConfig) -> dict[str, Any]:
    """Constructor arguments of the VQ-VAE, as plain values; raises UserError if sizes do not fit together."""
    if config.grid * config.downsampling != config.image_size:
        raise UserError(
            f"image_tokenizer.grid={config.grid}: {config.image_size} pixels at {config.downsampling} pixels per code "
            f"make {config.image_size / config.downsampling:g}; change image_size, downsampling or grid"
        )
    settings = {key: value for key, value in asdict(config).items() if key not in _TRAINING_KEYS}
    return plain(settings)


def transformer_settings(config: Config, vocabulary: Vocabulary) -> dict[str, Any]:
    """Constructor arguments of the transformer, as plain values; raises UserError if sizes do not fit together."""
    hidden_size, heads = config.model.hidden_size, config.model.num_heads
    if hidden_size % heads:
        raise UserError(
            f"model.hidden_size={hidden_size} is not a multiple of model.num_heads={heads}; change one of them"
        )
    return {"vocab_size": vocabulary.size, **plain(asdict(config.model))}


def predicted_ids(config: Config, template: Template) -> list[range] | None:
    """Per slot the ids that the loss is taken over; None: all of the vocabulary."""
    if config.compat.loss_over_vocabulary:
        return None
    if config.compat.loss_by_input:
        raise UserError("compat.loss_by_input=true gives loss to command tokens; set compat.loss_over_vocabulary=true")
    return [template.predicted(slot) for slot in template.slots]


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Enums replaced by their values, so that settings can be saved and compared."""
    return {key: value.value if isinstance(value, Enum) else value for key, value in settings.items()}


def configured_images(config: Config) -> ImageSizes:
    """The image tokenizer of `image_tokenizer=`."""
    return ImageSizes(vqvae_settings(config.image_tokenizer), config.image_tokenizer.image_size)


def images_of_run(config: Config) -> ImageSizes:
    """The image tokenizer that tasks after `vqvae` use: the newest one, or as configured where there is none yet."""
    path = _existing(config.outputs, "vqvae", config.image_tokenizer.path)
    if path is None or is_released(path):  # the released ones are of one size
        return configured_images(config)
    return _left_images(config, path, "image_tokenizer.path")


def trained_sizes(config: Config) -> SequenceSizes:
    """The model that stage 2 trains, with the vocabulary of the tokens that it will find; as configured without any."""
    images, vocabulary = _of_tokens(config)
    template = build_template(layout_settings(config, config.template), vocabulary)
    return SequenceSizes(transformer_settings(config, vocabulary), template, images)


def written_sizes(config: Config, task: str, key: str, given: str | None, layout: TemplateConfig) -> SequenceSizes:
    """A model that a task uses: the one `given`, the newest of its `task`, or as configured where there is none yet."""
    path = _existing(config.outputs, task, given)
    left = None if path is None else _left_model(config, path, key)
    if left is None:
        images = images_of_run(config)
        vocabulary = Vocabulary(images.settings["codebook_size"], config.text.vocab_size)
        template = build_template(layout_settings(config, layout), vocabulary)
        return SequenceSizes(transformer_settings(config, vocabulary), template, images)
    with unfit_named(left.folder / CONFIG):
        template = build_template(left.settings["template"], Vocabulary(**left.settings["vocabulary"]))
    images = _left_images(config, left.folder, key, "image_tokenizer")
    return SequenceSizes(left.settings["transformer"], template, images, left.folder / "text.model")


def _of_tokens(config: Config) -> tuple[ImageSizes, Vocabulary]:
    """Image tokenizer and vocabulary of `data.token_store`, of the newest store, or of the model to start from."""
    if config.data.token_store is not None or config.sequences.source == TokenSource.tokenize:
        path = _existing(config.outputs, "tokenize", config.data.token_store)
        if path is not None and path.is_dir() and (path / "text.model").exists():
            header = TokenStoreHeader.load(path / "token_store")
            images = _left_images(config, path / "image_tokenizer", "data.token_store")
            return images, Vocabulary(header.codebook_size, _text_vocab_size(path / "text.model"))
    start = _existing(config.outputs, config.starts_from, config.init_from) if starts_from_weights(config) else None
    left = None if start is None else _left_model(config, start, "init_from")
    if left is not None:
        images = _left_images(config, left.folder, "init_from", "image_tokenizer")
        return images, Vocabulary(**left.settings["vocabulary"])
    images = images_of_run(config)
    text_tokens = config.text.vocab_size
    if config.text.model is not None:
        text_tokens = _text_vocab_size(Path(config.text.model))
    return images, Vocabulary(images.settings["codebook_size"], text_tokens)


def _text_vocab_size(file: Path) -> int:
    """Of a SentencePiece model, which takes a moment to read; read again when the file has changed."""
    return (
        _read_text_vocab_size(file, file.stat().st_mtime_ns) if file.is_file() else TextTokenizer.load(file).vocab_size
    )


@cache
def _read_text_vocab_size(file: Path, changed: int) -> int:
    return TextTokenizer.load(file).vocab_size


def _existing(outputs: str, task: str | None, given: str | None) -> Path | None:
    """The folder that a task will find, or None where there is none; a wrong name is for the task to refuse."""
    try:
        return predecessor(outputs, task or "pretrain", "", given)
    except UserError:
        return None


class _Left(NamedTuple):
    """A sequence model that a run has left."""

    settings: dict[str, Any]
    folder: Path
    """The model folder that holds its tokenizers; of an adapter, that of its base."""


def _left_model(config: Config, path: Path, key: str) -> _Left | None:
    """What a run has left, read without weights; None for released weights, which say nothing of themselves."""
    if is_released(path):
        return None
    adapter = find_adapter(path)
    if adapter is None:
        settings = read_model_settings(path, SEQUENCE_MODEL, key, verify=config.verify)
        return _Left(settings, find_model_folder(path, key))
    own = read_adapter_settings(adapter, verify=config.verify)
    found = _left_model(config, Path(find_base(adapter, key)), key)
    return found and _Left({**found.settings, **own}, found.folder)


def _left_images(config: Config, path: Path, key: str, inner: str = "") -> ImageSizes:
    found = read_model_settings(path, IMAGE_TOKENIZER, key, inner, verify=config.verify)
    with unfit_named(find_model_folder(path, key) / inner / CONFIG):
        return ImageSizes(found["vqvae"], found["image_size"])
