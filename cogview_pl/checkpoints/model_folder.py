"""Model folders: the files of a model for inference, as safetensors and YAML, which cannot run code.

model/
  config.yaml           kind, options, template
  weights.safetensors
  manifest.json         hashes of the other files
  text.model            sequence model only: the SentencePiece file
  image_tokenizer/      sequence model only: a model folder of the image tokenizer
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from cogview_pl.checkpoints.manifest import MANIFEST, manifest_hash, require_undamaged, write_manifest
from cogview_pl.checkpoints.settings import (
    CONFIG,
    Settings,
    from_plain,
    read_settings,
    require_types,
    unfit_named,
    write_settings,
)
from cogview_pl.checkpoints.weights import load_weights, number_of_tensors, save_weights
from cogview_pl.durable.latest import through_latest
from cogview_pl.durable.read import why_unusable
from cogview_pl.errors import UserError
from cogview_pl.transformer.config import TransformerConfig
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, TextTokenizer, Vocabulary
from cogview_pl.vqvae.config import VQVAEConfig
from cogview_pl.vqvae.external import EXTERNAL, AnyTokenizer, build_external, is_trusted
from cogview_pl.vqvae.model import VQVAE
from cogview_pl.vqvae.quantizer_registry import quantizer_class

IMAGE_TOKENIZER = "image_tokenizer"
SEQUENCE_MODEL = "sequence_model"
FEATURE_NETWORK = "feature_network"

_MADE_BY = {IMAGE_TOKENIZER: "task=vqvae", SEQUENCE_MODEL: "task=pretrain", FEATURE_NETWORK: "task=features"}
_WEIGHTS, _TEXT, _IMAGES = "weights.safetensors", "text.model", "image_tokenizer"
_TOKENIZERS = (_TEXT, f"{_IMAGES}/{MANIFEST}")  # further files of a sequence model
_REPEATED = ("num_layers", "residual_blocks")  # settings that count parts with weights

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class ImageTokenizer:
    """A trained stage 1."""

    model: AnyTokenizer
    settings: Settings
    """Fields of `VQVAEConfig` as plain values (of another project: `external_settings`), and `image_size`."""

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the weights as saved; codes are valid for one tokenizer only."""
        return hashlib.sha256(save(_state(self.model))).hexdigest()

    @property
    def grid(self) -> tuple[int, int]:
        """`(y, x)` codes of an image of `image_size`."""
        edge = self.settings["image_size"] // self.model.downsampling
        return edge, edge


@dataclass(frozen=True)
class SequenceModel:
    """A trained stage 2 with its template and both tokenizers."""

    model: Transformer
    template: Template
    text: TextTokenizer
    image_tokenizer: ImageTokenizer
    settings: Settings
    merged_from: str | None = None
    """Identities of base and adapter, if the weights are their sum (which another machine may round differently)."""

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the transformer's weights in fp32. Read it before the weights change."""
        if self.merged_from is not None:
            return hashlib.sha256(self.merged_from.encode()).hexdigest()
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().float().contiguous().numpy().data)
        return digest.hexdigest()


def build_vqvae(settings: Settings) -> VQVAE:
    """VQVAE from plain values: those of `VQVAEConfig`."""
    config = from_plain(VQVAEConfig, settings)
    require_types(quantizer_class(str(config.quantizer["_target_"])), config.quantizer)
    return VQVAE(config)


def build_tokenizer(settings: Settings) -> AnyTokenizer:
    """Image tokenizer from plain values: those of `build_vqvae`, or those of another project."""
    return build_external(settings) if EXTERNAL in settings else build_vqvae(settings)


def build_transformer(settings: Settings) -> Transformer:
    """Transformer from plain values: those of `TransformerConfig`, and `vocab_size`."""
    options = dict(settings)
    vocab_size = _whole(options.pop("vocab_size"))
    return Transformer(from_plain(TransformerConfig, options), vocab_size=vocab_size)


def build_template(settings: Mapping[str, Any], vocabulary: Vocabulary) -> Template:
    """Template from plain values: its constructor arguments except the vocabulary."""
    return Template(**require_types(Template, settings), vocabulary=vocabulary)


def save_model(folder: Path, model: nn.Module, kind: str, settings: Settings, others: tuple[str, ...] = ()) -> None:
    """Write `weights.safetensors`, `config.yaml` and `manifest.json`.

    Args:
        folder: created if it is missing.
        model: its state dict is saved.
        kind: `IMAGE_TOKENIZER`, `SEQUENCE_MODEL` or `FEATURE_NETWORK`.
        settings: plain values from which `load_model` can build the model again.
        others: names of further files in the folder, for the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / _WEIGHTS, _state(model))
    # The config is written after the weights: without it a folder is no model folder, so a killed run leaves none.
    write_settings(folder, {"kind": kind, **settings})
    write_manifest(folder, (CONFIG, _WEIGHTS, *others))


def load_model(
    folder: Path, kind: str, key: str, build: Callable[[dict[str, Any]], M], *, verify: bool = True
) -> tuple[M, dict[str, Any]]:
    """The model in a folder that `save_model` wrote, in evaluation mode, fp32, and its settings.

    Args:
        folder: a model folder (`find_model_folder`).
        kind: required kind of the model.
        key: config key that error messages name.
        build: makes the model from the settings; called under the `meta` device, so that nothing is allocated.
        verify: compare the files with their hashes, and refuse weights that are not finite.

    Raises:
        UserError: a file is missing or damaged, of another kind, or the weights do not fit the settings.
    """
    if verify:
        require_undamaged(folder, (CONFIG, _WEIGHTS))
    settings = _settings_of(folder, kind, key)
    with unfit_named(folder / CONFIG):
        model = build_empty(settings, number_of_tensors(folder / _WEIGHTS), build)
    load_weights(model, folder / _WEIGHTS, finite=verify)
    return model, settings


def build_empty(settings: dict[str, Any], tensors: int, build: Callable[[dict[str, Any]], M]) -> M:
    """A model without memory for weights, which are assigned next; raises ValueError if it has more parts than these.

    Args:
        settings: values of `config.yaml`.
        tensors: number of saved weights.
        build: makes the model from the settings.
    """
    _require_few_parts(settings, tensors)
    with torch.device("meta"):  # no random weights, since the saved ones replace them
        return build(settings)


def save_image_tokenizer(folder: Path, tokenizer: ImageTokenizer) -> None:
    """Write the model folder of an image tokenizer."""
    save_model(folder, tokenizer.model, IMAGE_TOKENIZER, image_tokenizer_config(tokenizer.settings))


def image_tokenizer_config(settings: Settings) -> dict[str, Any]:
    """Values of `config.yaml` for an image tokenizer with the given `ImageTokenizer.settings`."""
    vqvae = dict(settings)
    return {"image_size": vqvae.pop("image_size"), "vqvae": vqvae}


def load_image_tokenizer(path: str | Path, key: str = "image_tokenizer.path", *, verify: bool = True) -> ImageTokenizer:
    """Read an image tokenizer from a run folder or model folder; errors name the config `key`."""
    folder = find_model_folder(path, key)
    model, config = load_model(
        folder, IMAGE_TOKENIZER, key, lambda config: build_tokenizer(config["vqvae"]), verify=verify
    )
    with unfit_named(folder / CONFIG):
        return image_tokenizer_of(model, config)


def image_tokenizer_of(model: AnyTokenizer, config: Settings) -> ImageTokenizer:
    """An image tokenizer from its model and the values of its `config.yaml`."""
    return ImageTokenizer(model, {**config["vqvae"], "image_size": _whole(config["image_size"])})


def save_sequence_model(
    folder: Path,
    model: Transformer,
    *,
    transformer: Settings,
    template: Settings,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    image_tokenizer: ImageTokenizer,
) -> None:
    """Write the model folder of a sequence model, with its image tokenizer and text tokenizer."""
    settings = sequence_model_config(transformer, template, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    text.save(folder / _TEXT)
    save_image_tokenizer(folder / _IMAGES, image_tokenizer)
    save_model(folder, model, SEQUENCE_MODEL, settings, others=_TOKENIZERS)


def sequence_model_config(transformer: Settings, template: Settings, vocabulary: Vocabulary) -> dict[str, Any]:
    """Values of `config.yaml` for a sequence model."""
    return {
        "transformer": dict(transformer),
        "template": dict(template),
        "vocabulary": {"codebook_size": vocabulary.codebook_size, "text_vocab_size": vocabulary.text_vocab_size},
    }


def load_sequence_model(path: str | Path, key: str = "init_from", *, verify: bool = True) -> SequenceModel:
    """Read a sequence model from a run folder or model folder; errors name the config `key`."""
    folder = find_model_folder(path, key)
    model, config = load_model(
        folder, SEQUENCE_MODEL, key, lambda config: build_transformer(config["transformer"]), verify=verify
    )
    if verify:
        require_undamaged(folder, _TOKENIZERS)
    text = TextTokenizer.load(folder / _TEXT)
    image_tokenizer = load_image_tokenizer(folder / _IMAGES, key, verify=verify)
    return sequence_model_of(model, config, text, image_tokenizer, named=f"{key}={path}", file=folder / CONFIG)


def sequence_model_of(
    model: Transformer,
    config: Settings,
    text: TextTokenizer,
    image_tokenizer: ImageTokenizer,
    *,
    named: str,
    file: Path,
) -> SequenceModel:
    """A sequence model from its parts.

    Args:
        model: the transformer.
        config: values of its `config.yaml`.
        text, image_tokenizer: its tokenizers.
        named: `KEY=PATH`, for messages.
        file: file of the values.

    Raises:
        UserError: the parts do not fit each other.
    """
    with unfit_named(file):
        vocabulary = Vocabulary(**require_types(Vocabulary, config["vocabulary"]))
        template = build_template(config["template"], vocabulary)
    if vocabulary.codebook_size != image_tokenizer.model.codebook_size:
        raise UserError(
            f"{named}: the sequence model knows {vocabulary.codebook_size} image codes, its image tokenizer has "
            f"{image_tokenizer.model.codebook_size}; the folder was put together from different runs"
        )
    if text.vocab_size != vocabulary.text_vocab_size:
        raise UserError(
            f"{named}: the sequence model knows {vocabulary.text_vocab_size} text tokens, its text.model has "
            f"{text.vocab_size}; the folder was put together from different runs"
        )
    for needed, has, what in (
        (vocabulary.size, model.token_embedding.num_embeddings, "tokens"),
        (template.num_positions, model.num_positions, "positions"),
    ):
        if needed > has:
            raise UserError(f"{file} needs {needed} {what}, the weights have {has}; copy the folder again")
    return SequenceModel(model, template, text, image_tokenizer, settings=dict(config))


def read_model_settings(
    path: str | Path, kind: str, key: str, inner: str = "", *, verify: bool = True
) -> dict[str, Any]:
    """The `config.yaml` of the model in a run folder or model folder, or of the folder `inner` in it, without weights.

    Raises:
        UserError: there is no model, or it has another kind; the message names the config `key`.
    """
    folder = find_model_folder(path, key) / inner
    if verify:
        require_undamaged(folder, (CONFIG,))
    settings = _settings_of(folder, kind, key)
    with unfit_named(folder / CONFIG):
        _require_few_parts(settings, number_of_tensors(folder / _WEIGHTS))
    return settings


def kind_of(path: str | Path, key: str) -> str:
    """Kind of the model in a run folder or model folder: `IMAGE_TOKENIZER`, `SEQUENCE_MODEL` or `FEATURE_NETWORK`."""
    return str(read_settings(find_model_folder(path, key)).get("kind"))


def folder_identity(path: str | Path, key: str) -> str:
    """Hash that changes with any file of the model in a run folder or model folder; it does not read the weights."""
    folder = find_model_folder(path, key)
    inner = folder / _IMAGES
    return " ".join(manifest_hash(part) for part in (folder, inner) if part.is_dir())


def find_model_folder(path: str | Path, key: str) -> Path:
    """The model folder at a path: the path itself, or `model/` in a run folder; raises UserError if there is none."""
    path = through_latest(path)
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file() and (folder / _WEIGHTS).is_file():
            return folder
    found = "holds no model/ (did the run finish?)" if path.exists() else why_unusable(path)
    raise UserError(f"{key}={path} {found}; give a run folder or a model/ folder")


def _settings_of(folder: Path, kind: str, key: str) -> dict[str, Any]:
    settings = read_settings(folder)
    require_kind(settings, kind, folder, key)
    if kind == IMAGE_TOKENIZER:
        require_quantizer(settings, folder, key)
    return settings


def require_kind(settings: Mapping[str, Any], kind: str, path: Path, key: str) -> None:
    """Raises UserError if the `kind` of a saved model is another one."""
    found = settings.get("kind")
    if found != kind:
        raise UserError(
            f"{key}={path} holds a model of kind {found}, needed is {kind}; give the run of {_MADE_BY[kind]}"
        )


def require_quantizer(settings: Mapping[str, Any], folder: Path, key: str, described_by: str = CONFIG) -> None:
    """Raises UserError for a quantizer or tokenizer whose class is not imported: a folder may not import anything."""
    with unfit_named(folder / described_by):
        external = settings["vqvae"].get(EXTERNAL)
        target = str((settings["vqvae"]["quantizer"] if external is None else external)["_target_"])
    if external is not None:
        if not is_trusted(target):
            raise UserError(
                f"{key}={folder}: {described_by} names the image tokenizer {target[:100]!r}, which this run does not; "
                "name it in image_tokenizer.external._target_ if you trust its file"
            )
        return
    try:
        quantizer_class(target)
    except UserError as error:
        raise UserError(
            f"{key}={folder}: {described_by} names the quantizer {target[:100]!r}, which is not imported; name it in "
            "image_tokenizer.quantizer._target_ if you trust its file (in Python: import its module first)"
        ) from error


def _require_few_parts(settings: Mapping[str, Any], tensors: int) -> None:
    """Raises ValueError for settings with more parts than there are weights, before they are built."""
    for group in settings.values():
        for name in _REPEATED:
            if isinstance(group, Mapping) and name in group and _whole(group[name]) > tensors:
                raise ValueError(f"{name} is {group[name]}, and there are {tensors} weights")


def _whole(value: object) -> int:
    """The value; raises ValueError unless it is a whole number from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"found {value!r} for a whole number")
    return value


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
