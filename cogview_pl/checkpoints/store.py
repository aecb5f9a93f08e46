"""Model folders: all that inference needs, as safetensors and YAML, nothing that could run code.

model/
  config.yaml           kind, constructor arguments, template, identities
  weights.safetensors
  text.model            sequence model only: the SentencePiece file
  image_tokenizer/      sequence model only: a model folder of the image tokenizer
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from yaml import YAMLError

from cogview_pl.durable import replacing, write_text
from cogview_pl.errors import UserError
from cogview_pl.transformer import Transformer
from cogview_pl.vocab import Template, TextTokenizer, Vocabulary
from cogview_pl.vqvae import VQVAE, make_quantizer

IMAGE_TOKENIZER = "image_tokenizer"
SEQUENCE_MODEL = "sequence_model"

_MADE_BY = {IMAGE_TOKENIZER: "task=vqvae", SEQUENCE_MODEL: "task=pretrain"}

Settings = Mapping[str, Any]


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
        """`(y, x)` codes of a picture of `image_size`."""
        edge = self.settings["image_size"] // self.model.downsampling
        return edge, edge


@dataclass(frozen=True)
class SequenceModel:
    """A trained stage 2 with everything needed to turn prompts into pictures."""

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
    """VQVAE from its constructor arguments; `quantizer` is a mapping `{kind: …, …}`."""
    arguments = dict(settings)
    options = dict(arguments.pop("quantizer"))
    sizes = {"num_codes": arguments["num_codes"], "code_dim": arguments["code_dim"]}
    quantizer = make_quantizer(options.pop("kind"), **sizes, **options)
    return VQVAE(**arguments, quantizer=quantizer)


def build_template(settings: Mapping[str, Any], vocabulary: Vocabulary) -> Template:
    """Template from its constructor arguments."""
    return Template(**settings, vocabulary=vocabulary)


def save_image_tokenizer(folder: Path, tokenizer: ImageTokenizer) -> None:
    """Write a model folder."""
    settings = dict(tokenizer.settings)
    image_size = settings.pop("image_size")
    _save(folder, tokenizer.model, {"kind": IMAGE_TOKENIZER, "image_size": image_size, "vqvae": settings})


def load_image_tokenizer(path: str | Path, key: str = "image_tokenizer.path") -> ImageTokenizer:
    """Read an image tokenizer from a run folder or model folder; errors name the config `key`."""
    folder = find_model_folder(path, key)
    config = _read_config(folder, IMAGE_TOKENIZER, key)
    model = build_vqvae(config["vqvae"])
    _load_weights(model, folder)
    return ImageTokenizer(model, {**config["vqvae"], "image_size": config["image_size"]})


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
    config = {
        "kind": SEQUENCE_MODEL,
        "transformer": dict(transformer),
        "template": dict(template),
        "vocabulary": {"num_codes": vocabulary.num_codes, "num_pieces": vocabulary.num_pieces},
    }
    folder.mkdir(parents=True, exist_ok=True)
    text.save(folder / "text.model")
    save_image_tokenizer(folder / "image_tokenizer", image_tokenizer)
    _save(folder, model, config)


def load_sequence_model(path: str | Path, key: str = "init_from") -> SequenceModel:
    """Read a sequence model from a run folder or model folder; errors name the config `key`."""
    folder = find_model_folder(path, key)
    config = _read_config(folder, SEQUENCE_MODEL, key)
    vocabulary = Vocabulary(**config["vocabulary"])
    image_tokenizer = load_image_tokenizer(folder / "image_tokenizer", key)
    if vocabulary.num_codes != image_tokenizer.model.num_codes:
        raise UserError(
            f"{key}={path}: the sequence model knows {vocabulary.num_codes} image codes, its image tokenizer has "
            f"{image_tokenizer.model.num_codes}; the folder was put together from different runs"
        )
    text = TextTokenizer.load(folder / "text.model")
    if text.num_pieces != vocabulary.num_pieces:
        raise UserError(
            f"{key}={path}: the sequence model knows {vocabulary.num_pieces} text pieces, its text.model has "
            f"{text.num_pieces}; the folder was put together from different runs"
        )
    with torch.device("meta"):  # the weights take the place of random ones that nobody needs
        model = Transformer(**config["transformer"])
    _load_weights(model, folder)
    return SequenceModel(
        model=model,
        template=build_template(config["template"], vocabulary),
        text=text,
        image_tokenizer=image_tokenizer,
        settings=config,
    )


def read_settings(path: str | Path, kind: str, key: str, inner: str = "") -> dict[str, Any]:
    """The `config.yaml` of a run folder's or model folder's model, or of the folder `inner` in it; no weights are read.

    Raises:
        UserError: there is none, or it is of another kind; the message names the config `key`.
    """
    return _read_config(find_model_folder(path, key) / inner, kind, key)


def kind_of(path: str | Path, key: str) -> str:
    """`IMAGE_TOKENIZER` or `SEQUENCE_MODEL`: what a run folder or model folder holds."""
    folder = find_model_folder(path, key)
    return str(OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "kind"))


def find_model_folder(path: str | Path, key: str) -> Path:
    """The model folder that a path means: itself, or `model/` inside a run folder."""
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.yaml").is_file() and (folder / "weights.safetensors").is_file():
            return folder
    found = "holds no model/ (did the run finish?)" if path.exists() else "does not exist"
    raise UserError(f"{key}={path} {found}; give a run folder or a model/ folder")


def _save(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "weights.safetensors") as draft:
        save_file(_state(model), draft)
    # Last, because it is what makes a folder a model: one that a kill left unfinished is taken for none.
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))


def _read_config(folder: Path, kind: str, key: str) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except (YAMLError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.yaml'} is damaged ({reason}); copy the run again") from error
    found = config.get("kind") if isinstance(config, dict) else None
    if found != kind:
        raise UserError(
            f"{key}={folder} holds a model of kind {found}, needed is {kind}; give the run of {_MADE_BY[kind]}"
        )
    return config  # type: ignore[return-value]


def _load_weights(model: nn.Module, folder: Path) -> None:
    file = folder / "weights.safetensors"
    try:
        model.load_state_dict({name: _float32(tensor) for name, tensor in load_file(file).items()}, assign=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file} does not fit its config.yaml or is damaged: {reason}") from error
    model.eval()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _float32(tensor: Tensor) -> Tensor:
    """Converted weights may be stored in half precision; counters stay what they are."""
    return tensor.float() if tensor.is_floating_point() else tensor
