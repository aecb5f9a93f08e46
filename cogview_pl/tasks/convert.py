"""task=convert: released CogView checkpoints → model folders, and back; adapters, checkpoints → model folders."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from cogview_pl.assembly.models import open_image_tokenizer, open_sequence_model
from cogview_pl.assembly.options import ModelOptions
from cogview_pl.checkpoints.adapter_folder import find_adapter
from cogview_pl.checkpoints.model_folder import (
    IMAGE_TOKENIZER,
    kind_of,
    load_image_tokenizer,
    load_sequence_model,
    save_image_tokenizer,
    save_sequence_model,
)
from cogview_pl.checkpoints.released import is_released, is_vqvae_file, save_transformer, save_vqvae
from cogview_pl.checkpoints.training_checkpoint import find_checkpoint, read_checkpoint
from cogview_pl.config.parts import model_options
from cogview_pl.config.schema import Config
from cogview_pl.durable.read import why_unusable
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.vocab import Vocabulary
from cogview_pl.vocab.config import TemplateConfig
from cogview_pl.vqvae.external import ExternalTokenizer

_SOURCE = "convert.source"


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Convert a model; returns its number of parameters."""
    assert config.convert is not None
    source, target = Path(config.convert.source), Path(config.convert.target)
    if not source.exists():
        raise UserError(f"{_SOURCE}={source} {why_unusable(source)}; give a released file or folder, or a run folder")
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"convert.target={target} exists ({why_unusable(target)}); choose another or delete it")
    to_ours = is_released(source) or find_adapter(source) is not None or find_checkpoint(source) is not None
    parameters = (
        _to_ours(model_options(config), config.template, source, target)
        if to_ours
        else _to_released(source, target, config.verify)
    )
    return {"convert/parameters": parameters}


def _to_ours(options: ModelOptions, template: TemplateConfig, source: Path, target: Path) -> int:
    if _holds_image_tokenizer(source):
        tokenizer = open_image_tokenizer(options, source, _SOURCE)
        save_image_tokenizer(target, tokenizer)
        return _size(tokenizer.model)
    found = open_sequence_model(options, source, _SOURCE, template)
    save_sequence_model(
        target,
        found.model,
        transformer=found.settings["transformer"],
        template=found.settings["template"],
        vocabulary=Vocabulary(**found.settings["vocabulary"]),
        text=found.text,
        image_tokenizer=found.image_tokenizer,
    )
    return _size(found.model)


def _holds_image_tokenizer(source: Path) -> bool:
    """Whether a checkpoint or a released file is of an image tokenizer."""
    if find_checkpoint(source) is not None:
        return read_checkpoint(source, _SOURCE, None, verify=False).config["kind"] == IMAGE_TOKENIZER
    return source.is_file() and is_vqvae_file(source, _SOURCE, verify=False)


def _to_released(source: Path, target: Path, verify: bool) -> int:
    if kind_of(source, _SOURCE) == IMAGE_TOKENIZER:
        tokenizer = load_image_tokenizer(source, _SOURCE, verify=verify)
        if target.suffix != ".pt":
            raise UserError(f"convert.target={target}: a released tokenizer is one file; end the name in .pt")
        if isinstance(tokenizer.model, ExternalTokenizer):
            raise UserError(f"{_SOURCE}={source} is an image tokenizer of another project; it has no released form")
        save_vqvae(tokenizer.model, target)
        return _size(tokenizer.model)
    found = load_sequence_model(source, _SOURCE, verify=verify)
    save_transformer(found.model, target)
    return _size(found.model)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
