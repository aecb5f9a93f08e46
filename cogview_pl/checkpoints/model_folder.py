"""Model folders: all that inference needs, as safetensors and YAML, nothing that could run code.

model/
  config.yaml           kind, constructor arguments, template, identities
  weights.safetensors
  manifest.json         hashes of the files beside it
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
from cogview_pl.durable.read import why_unusable
from cogview_pl.errors import UserError
from cogview_pl.transformer.config import TransformerConfig
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, TextTokenizer, Vocabulary
from cogview_pl.vqvae.config import VQVAEConfig
from cogview_pl.vqvae.model import VQVAE
from cogview_pl.vqvae.quantizer_registry import quantizer_class

IMAGE_TOKENIZER = "image_tokenizer"
SEQUENCE_MODEL = "sequence_model"
FEATURE_NETWORK = "feature_network"

_MADE_BY = {IMAGE_TOKENIZER: "task=vqvae", SEQUENCE_MODEL: "task=pretrain", FEATURE_NETWORK: "task=features"}
_WEIGHTS, _TEXT, _IMAGES = "weights.safetensors", "text.model", "image_tokenizer"
_BESIDE = (_TEXT, f"{_IMAGES}/{MANIFEST}")  # what belongs to the weights of a sequence model
_REPEATED = ("num_layers", "residual_blocks")  # settings that say how often a part with weights occurs

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class ImageTokenizer:
    """A trained stage 1."""

    model: VQVAE
    settings: Settings
    """Constructor arguments and `image_size`."""

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the weights as they are saved: codes of another tokenizer mean something else."""
        return hashlib.sha256(save(_state(self.model))).hexdigest()

    @property
    def grid(self) -> tuple[int, int]:
        """`(y, x)` codes of a image of `image_size`."""
        edge = self.settings["image_size"] // self.model.downsampling
        return edge, edge


@dataclass(frozen=True)
class SequenceModel:
    """A trained stage 2 with everything needed to turn prompts into images."""

    model: Transformer
    template: Template
    text: TextTokenizer
    image_tokenizer: ImageTokenizer
    settings: Settings
    merged_from: str | None = None
    """Of weights that an adapter was added to when they were read: the identities of both. (Sums of floating-point
    numbers need not be the same to the bit on another machine.)"""

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the transformer's weights in fp32, whatever they are saved in; to be read before they change."""
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


def build_transformer(settings: Settings) -> Transformer:
    """Transformer from plain values: those of `TransformerConfig`, and `vocab_size`."""
    options = dict(settings)
    vocab_size = _whole(options.pop("vocab_size"))
    return Transformer(from_plain(TransformerConfig, options), vocab_size=vocab_size)


def build_template(settings: Mapping[str, Any], vocabulary: Vocabulary) -> Template:
    """Template from its constructor arguments."""
    return Template(**require_types(Template, settings), vocabulary=vocabulary)


def save_model(folder: Path, model: nn.Module, kind: str, settings: Settings, beside: tuple[str, ...] = ()) -> None:
    """Write `weights.safetensors`, `config.yaml` and `manifest.json`.

    Args:
        folder: made if it is missing.
        model: its state dict is what is saved.
        kind: `IMAGE_TOKENIZER`, `SEQUENCE_MODEL` or `FEATURE_NETWORK`.
        settings: plain values; all that `load_model` needs to build the model again.
        beside: further files that are in the folder already, for the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / _WEIGHTS, _state(model))
    # The config comes after the weights: a folder without it, which a kill left, is taken for none.
    write_settings(folder, {"kind": kind, **settings})
    write_manifest(folder, (CONFIG, _WEIGHTS, *beside))


def load_model(
    folder: Path, kind: str, key: str, build: Callable[[dict[str, Any]], M], *, verify: bool = True
) -> tuple[M, dict[str, Any]]:
    """The model in a folder that `save_model` wrote, in evaluation mode, fp32, and its settings.

    Args:
        folder: as `find_model_folder` gives it.
        kind: that the folder must hold.
        key: of the configuration, for errors.
        build: makes the model from the settings; called under the `meta` device, so that nothing is allocated.
        verify: compare the files with their hashes, and look for weights that are not finite.

    Raises:
        UserError: a file is missing or damaged, of another kind, or the weights do not fit the settings.
    """
    if verify:
        require_undamaged(folder, (CONFIG, _WEIGHTS))
    settings = _settings_of(folder, kind, key)
    with unfit_named(folder / CONFIG):
        _require_few_parts(settings, number_of_tensors(folder / _WEIGHTS))
        with torch.device("meta"):  # the weights take the place of random ones that nobody needs
            model = build(settings)
    load_weights(model, folder / _WEIGHTS, finite=verify)
    return model, settings


def save_image_tokenizer(folder: Path, tokenizer: ImageTokenizer) -> None:
    """Write a model folder."""
    settings = dict(tokenizer.settings)
    image_size = settings.pop("image_size")
    save_model(folder, tokenizer.model, IMAGE_TOKENIZER, {"image_size": image_size, "vqvae": settings})


def load_image_tokenizer(path: str | Path, key: str = "image_tokenizer.path", *, verify: bool = True) -> ImageTokenizer:
    """Read an image tokenizer from a run folder or model folder; errors name the config `key`."""
    folder = find_model_folder(path, key)
    model, config = load_model(folder, IMAGE_TOKENIZER, key, lambda config: build_vqvae(config["vqvae"]), verify=verify)
    with unfit_named(folder / CONFIG):
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
    """Write a model folder that holds the image tokenizer and the text tokenizer as well."""
    settings = {
        "transformer": dict(transformer),
        "template": dict(template),
        "vocabulary": {"codebook_size": vocabulary.codebook_size, "text_vocab_size": vocabulary.text_vocab_size},
    }
    folder.mkdir(parents=True, exist_ok=True)
    text.save(folder / _TEXT)
    save_image_tokenizer(folder / _IMAGES, image_tokenizer)
    save_model(folder, model, SEQUENCE_MODEL, settings, beside=_BESIDE)


def load_sequence_model(path: str | Path, key: str = "init_from", *, verify: bool = True) -> SequenceModel:
    """Read a sequence model from a run folder or model folder; errors name the config `key`."""
    folder = find_model_folder(path, key)
    model, config = load_model(
        folder, SEQUENCE_MODEL, key, lambda config: build_transformer(config["transformer"]), verify=verify
    )
    if verify:
        require_undamaged(folder, _BESIDE)
    text = TextTokenizer.load(folder / _TEXT)
    image_tokenizer = load_image_tokenizer(folder / _IMAGES, key, verify=verify)
    with unfit_named(folder / CONFIG):
        vocabulary = Vocabulary(**require_types(Vocabulary, config["vocabulary"]))
        template = build_template(config["template"], vocabulary)
    if vocabulary.codebook_size != image_tokenizer.model.codebook_size:
        raise UserError(
            f"{key}={path}: the sequence model knows {vocabulary.codebook_size} image codes, its image tokenizer has "
            f"{image_tokenizer.model.codebook_size}; the folder was put together from different runs"
        )
    if text.vocab_size != vocabulary.text_vocab_size:
        raise UserError(
            f"{key}={path}: the sequence model knows {vocabulary.text_vocab_size} text tokens, its text.model has "
            f"{text.vocab_size}; the folder was put together from different runs"
        )
    for needed, has, what in (
        (vocabulary.size, model.token_embedding.num_embeddings, "tokens"),
        (template.num_positions, model.num_positions, "positions"),
    ):
        if needed > has:
            raise UserError(f"{folder / CONFIG} needs {needed} {what}, the weights have {has}; copy the folder again")
    return SequenceModel(model=model, template=template, text=text, image_tokenizer=image_tokenizer, settings=config)


def read_model_settings(
    path: str | Path, kind: str, key: str, inner: str = "", *, verify: bool = True
) -> dict[str, Any]:
    """The `config.yaml` of a run folder's or model folder's model, or of the folder `inner` in it; no weights are read.

    Raises:
        UserError: there is none, or it is of another kind; the message names the config `key`.
    """
    folder = find_model_folder(path, key) / inner
    if verify:
        require_undamaged(folder, (CONFIG,))
    settings = _settings_of(folder, kind, key)
    with unfit_named(folder / CONFIG):
        _require_few_parts(settings, number_of_tensors(folder / _WEIGHTS))
    return settings


def kind_of(path: str | Path, key: str) -> str:
    """`IMAGE_TOKENIZER`, `SEQUENCE_MODEL` or `FEATURE_NETWORK`: what a run folder or model folder holds."""
    return str(read_settings(find_model_folder(path, key)).get("kind"))


def folder_identity(path: str | Path, key: str) -> str:
    """Hash that changes with any file of a run folder's model or of a model folder, without reading the weights."""
    folder = find_model_folder(path, key)
    inner = folder / _IMAGES
    return " ".join(manifest_hash(part) for part in (folder, inner) if part.is_dir())


def find_model_folder(path: str | Path, key: str) -> Path:
    """The model folder that a path means: itself, or `model/` inside a run folder."""
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file() and (folder / _WEIGHTS).is_file():
            return folder
    found = "holds no model/ (did the run finish?)" if path.exists() else why_unusable(path)
    raise UserError(f"{key}={path} {found}; give a run folder or a model/ folder")


def _settings_of(folder: Path, kind: str, key: str) -> dict[str, Any]:
    settings = read_settings(folder)
    found = settings.get("kind")
    if found != kind:
        raise UserError(
            f"{key}={folder} holds a model of kind {found}, needed is {kind}; give the run of {_MADE_BY[kind]}"
        )
    if kind == IMAGE_TOKENIZER:
        _require_quantizer(settings, folder, key)
    return settings


def _require_quantizer(settings: Mapping[str, Any], folder: Path, key: str) -> None:
    """Raises UserError for a quantizer whose class is not imported: a folder may not import anything."""
    with unfit_named(folder / CONFIG):
        target = str(settings["vqvae"]["quantizer"]["_target_"])
    try:
        quantizer_class(target)
    except UserError as error:
        raise UserError(
            f"{key}={folder}: {CONFIG} names the quantizer {target[:100]!r}, which is not imported; name it in "
            "image_tokenizer.quantizer._target_ if you trust its file (in Python: import its module first)"
        ) from error


def _require_few_parts(settings: Mapping[str, Any], tensors: int) -> None:
    """Raises ValueError for settings that ask for more parts than there are weights, before they are built."""
    for group in settings.values():
        for name in _REPEATED:
            if isinstance(group, Mapping) and name in group and _whole(group[name]) > tensors:
                raise ValueError(f"{name} is {group[name]}, and there are {tensors} weights")


def _whole(value: object) -> int:
    """The value; raises ValueError for anything but a whole number from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"found {value!r} for a whole number")
    return value


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
