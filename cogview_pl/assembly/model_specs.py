"""Constructor arguments of configured models and of trained models, without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from cogview_pl.assembly.models import configured_external
from cogview_pl.assembly.options import ModelOptions
from cogview_pl.assembly.roles import Role
from cogview_pl.checkpoints.adapter_folder import find_adapter, find_base, read_adapter_settings
from cogview_pl.checkpoints.model_folder import (
    IMAGE_TOKENIZER,
    SEQUENCE_MODEL,
    build_template,
    find_model_folder,
    read_model_settings,
)
from cogview_pl.checkpoints.released import is_released
from cogview_pl.checkpoints.settings import CONFIG, plain, unfit_named
from cogview_pl.checkpoints.training_checkpoint import find_checkpoint, read_checkpoint, text_in
from cogview_pl.data.config import TokenSource
from cogview_pl.data.token_store.header import TokenStoreHeader
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import predecessor
from cogview_pl.transformer.config import TransformerConfig
from cogview_pl.vocab import Template, TextTokenizer, Vocabulary
from cogview_pl.vocab.config import CompatConfig, TemplateConfig
from cogview_pl.vqvae.config import ImageTokenizerConfig, VQVAEConfig


@dataclass(frozen=True)
class ImageTokenizerSpec:
    """An image tokenizer: constructor arguments, and the edge of its images in pixels."""

    settings: dict[str, Any]
    edge: int

    @property
    def grid(self) -> tuple[int, int]:
        """Number of codes `(y, x)` of an image."""
        codes = self.edge // self.settings["downsampling"]
        return codes, codes


@dataclass(frozen=True)
class SequenceModelSpec:
    """A sequence model: constructor arguments, its layout, and its image tokenizer."""

    settings: dict[str, Any]
    template: Template
    images: ImageTokenizerSpec
    text: Callable[[], TextTokenizer] | None = None
    """Reads the text tokenizer of a trained model; None for a configured one."""


def vqvae_settings(config: ImageTokenizerConfig) -> dict[str, Any]:
    """Constructor arguments of the VQ-VAE, as plain values; raises UserError if sizes do not fit together."""
    if config.image_size % config.downsampling:
        raise UserError(
            f"image_tokenizer.image_size={config.image_size} is not a multiple of "
            f"image_tokenizer.downsampling={config.downsampling}; change one of them"
        )
    return plain({item.name: getattr(config, item.name) for item in fields(VQVAEConfig)})


def transformer_settings(config: TransformerConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """Constructor arguments of the transformer, as plain values; raises UserError if sizes do not fit together."""
    hidden_size, heads = config.hidden_size, config.num_heads
    if hidden_size % heads:
        raise UserError(
            f"model.hidden_size={hidden_size} is not a multiple of model.num_heads={heads}; change one of them"
        )
    return {"vocab_size": vocabulary.size, **plain(config)}


def predicted_ids(compat: CompatConfig, template: Template) -> list[range] | None:
    """Ids that the loss of each slot covers; None: the whole vocabulary."""
    if compat.loss_over_vocabulary:
        return None
    if compat.loss_by_input:
        raise UserError("compat.loss_by_input=true gives loss to command tokens; set compat.loss_over_vocabulary=true")
    return [template.predicted(slot) for slot in template.slots]


def configured_images(options: ModelOptions) -> ImageTokenizerSpec:
    """The image tokenizer that `image_tokenizer=` describes."""
    return ImageTokenizerSpec(vqvae_settings(options.image_tokenizer), options.image_tokenizer.image_size)


def existing_images(options: ModelOptions) -> ImageTokenizerSpec:
    """The image tokenizer that tasks after `vqvae` use: the newest one, or the configured one before any run."""
    images = options.image_tokenizer
    if images.external is not None and images.path is None:
        return ImageTokenizerSpec(dict(configured_external(images).settings), images.image_size)
    path = _existing(options.outputs, "vqvae", images.path)
    if path is None or is_released(path):  # all released tokenizers have the same size
        return configured_images(options)
    return _saved_images(path, "image_tokenizer.path", verify=options.verify)


def training_spec(
    options: ModelOptions,
    template: TemplateConfig,
    *,
    source: TokenSource,
    token_store: str | None,
    start: tuple[str, str | None] | None,
) -> SequenceModelSpec:
    """The model that stage 2 trains, with the vocabulary of its token store.

    Args:
        options: options of the run.
        template: layout of the model.
        source, token_store: `sequences.source` and `data.token_store`.
        start: task and `init_from` of the model that training starts from; None: random weights.
    """
    images, vocabulary = _of_tokens(options, source, token_store, start)
    return SequenceModelSpec(
        transformer_settings(options.transformer, vocabulary),
        build_template(options.layout(template), vocabulary),
        images,
    )


def role_spec(role: Role, options: ModelOptions, given: str | None, template: TemplateConfig) -> SequenceModelSpec:
    """The model of a role: the one `given`, else the newest of the role's task, else the configured one."""
    path = _existing(options.outputs, role.task, given)
    saved = None if path is None else saved_model(path, role.key, verify=options.verify)
    if saved is None:
        images = existing_images(options)
        vocabulary = Vocabulary(images.settings["codebook_size"], options.text.vocab_size)
        return SequenceModelSpec(
            transformer_settings(options.transformer, vocabulary),
            build_template(options.layout(template), vocabulary),
            images,
        )
    with unfit_named(saved.file):
        built = build_template(saved.settings["template"], Vocabulary(**saved.settings["vocabulary"]))
    return SequenceModelSpec(saved.settings["transformer"], built, saved.images, saved.text)


def _of_tokens(
    options: ModelOptions, source: TokenSource, token_store: str | None, start: tuple[str, str | None] | None
) -> tuple[ImageTokenizerSpec, Vocabulary]:
    """Image tokenizer and vocabulary of the token store (given or newest), or of the model to start from."""
    if token_store is not None or source == TokenSource.tokenize:
        path = _existing(options.outputs, "tokenize", token_store)
        if path is not None and path.is_dir() and (path / "text.model").exists():
            header = TokenStoreHeader.load(path / "token_store")
            images = _saved_images(path / "image_tokenizer", "data.token_store", verify=options.verify)
            return images, Vocabulary(header.codebook_size, _text_vocab_size(path / "text.model"))
    base = None if start is None else _existing(options.outputs, *start)
    saved = None if base is None else saved_model(base, "init_from", verify=options.verify)
    if saved is not None and is_of_size(saved.settings["transformer"], options.transformer):
        return saved.images, Vocabulary(**saved.settings["vocabulary"])
    images = existing_images(options) if saved is None else configured_images(options)
    vocab_size = options.text.vocab_size
    if options.text.model is not None:
        vocab_size = _text_vocab_size(Path(options.text.model))
    return images, Vocabulary(images.settings["codebook_size"], vocab_size)


def is_of_size(found: Mapping[str, Any], wanted: TransformerConfig) -> bool:
    """Whether a saved transformer has the layers and the hidden size of a configured one."""
    return (found["num_layers"], found["hidden_size"]) == (wanted.num_layers, wanted.hidden_size)


def _text_vocab_size(file: Path) -> int:
    """Vocabulary size of a SentencePiece model; cached until the file changes, because reading is slow."""
    return (
        _read_text_vocab_size(file, file.stat().st_mtime_ns) if file.is_file() else TextTokenizer.load(file).vocab_size
    )


@cache
def _read_text_vocab_size(file: Path, changed: int) -> int:
    return TextTokenizer.load(file).vocab_size


def _existing(outputs: str, task: str, given: str | None) -> Path | None:
    """The folder that a task will find; None if there is none. The task itself refuses a wrong name."""
    try:
        return predecessor(outputs, task, "", given)
    except UserError:
        return None


class Saved(NamedTuple):
    """Settings of a saved sequence model; an adapter has the tokenizers of its base."""

    settings: dict[str, Any]
    images: ImageTokenizerSpec
    text: Callable[[], TextTokenizer]
    file: Path
    """File of the settings."""


def saved_model(path: Path, key: str, *, verify: bool) -> Saved | None:
    """Settings of a saved model, read without its weights; None for released weights, which have no settings."""
    if is_released(path):
        return None
    adapter = find_adapter(path)
    if adapter is not None:
        own = read_adapter_settings(adapter, verify=verify)
        found = saved_model(Path(find_base(adapter, key)), key, verify=verify)
        return found and found._replace(settings={**found.settings, **own})
    if find_checkpoint(path) is not None:
        return _in_checkpoint(path, key)
    settings = read_model_settings(path, SEQUENCE_MODEL, key, verify=verify)
    folder = find_model_folder(path, key)
    images = _saved_images(folder, key, "image_tokenizer", verify=verify)
    return Saved(settings, images, partial(TextTokenizer.load, folder / "text.model"), folder / CONFIG)


def _in_checkpoint(path: Path, key: str) -> Saved:
    """Settings of the model in a checkpoint of training."""
    checkpoint = read_checkpoint(path, key, SEQUENCE_MODEL, verify=False)
    with unfit_named(checkpoint.file, "file"):
        images = _images_of(checkpoint.parts["image_tokenizer"]["config"])
    return Saved(checkpoint.config, images, partial(text_in, checkpoint), checkpoint.file)


def _saved_images(path: Path, key: str, inner: str = "", *, verify: bool) -> ImageTokenizerSpec:
    if find_checkpoint(path) is not None:
        checkpoint = read_checkpoint(path, key, IMAGE_TOKENIZER, verify=False)
        with unfit_named(checkpoint.file, "file"):
            return _images_of(checkpoint.config)
    found = read_model_settings(path, IMAGE_TOKENIZER, key, inner, verify=verify)
    with unfit_named(find_model_folder(path, key) / inner / CONFIG):
        return _images_of(found)


def _images_of(config: dict[str, Any]) -> ImageTokenizerSpec:
    return ImageTokenizerSpec(config["vqvae"], config["image_size"])
