"""Opens the models that a configuration names: our run folders, or released checkpoints as they were downloaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash

from cogview_pl.checkpoints.adapter_folder import BASE, find_adapter, load_adapted
from cogview_pl.checkpoints.manifest import MANIFEST
from cogview_pl.checkpoints.model_folder import (
    ImageTokenizer,
    SequenceModel,
    build_template,
    load_image_tokenizer,
)
from cogview_pl.checkpoints.released import is_released, load_transformer, load_vqvae, vqvae_settings
from cogview_pl.config.schema import Config
from cogview_pl.errors import UserError
from cogview_pl.generation.config import Quantization
from cogview_pl.vocab import Template, TextTokenizer, Vocabulary
from cogview_pl.vocab.config import TemplateConfig

_ROLES = {"cogview-base": "init_from", "cogview-sr": "upscale_with", "cogview-caption": "rerank_with"}
"""The key that each released folder is for; any can be finetuned. Its files do not tell, so its name must."""

_WEIGHTS = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


def weights_dtype(config: Config) -> torch.dtype:
    """Precision of the weights that paint: half of `precision=fp16` or `bf16`, where training keeps fp32 ones."""
    return _WEIGHTS.get(config.precision["precision"], torch.float32)


def check_precision(config: Config) -> None:
    """Raises UserError for fp16 without a GPU, which has no fp16 arithmetic to speak of."""
    if config.precision.get("precision") == "16-mixed" and not torch.cuda.is_available():
        raise UserError("precision=fp16 needs a CUDA GPU and none was found; use precision=fp32 or precision=bf16")


def starts_from_weights(config: Config) -> bool:
    """Whether a training run begins with the weights of a model instead of random ones."""
    return config.init_from is not None or config.starts_from is not None


def inference_device(config: Config) -> tuple[str, torch.dtype]:
    """Where models paint, caption and rank, and in which precision; raises UserError for fp16 without a GPU."""
    check_precision(config)
    return "cuda" if torch.cuda.is_available() else "cpu", weights_dtype(config)


def quantization(config: Config) -> Quantization | None:
    """Number format of the blocks' matrices for inference; None: not quantized."""
    return config.quantization


def layout_settings(config: Config, template: TemplateConfig) -> dict[str, Any]:
    """Constructor arguments of a template, as plain values."""
    compat = config.compat
    return {
        **asdict(template),
        "text_length": config.text.max_length,
        "restart_after_token": compat.restart_after_token,
        "loss_by_input": compat.loss_by_input,
    }


def check_positions(template: Template, num_positions: int) -> None:
    """Raises UserError if the longest sequence of a template needs more positions than the model has."""
    if template.num_positions > num_positions:
        raise UserError(
            f"model.num_positions={num_positions}: the longest sequence needs {template.num_positions} "
            "(text.max_length plus the codes); raise model.num_positions, choose a larger model, or lower "
            "text.max_length"
        )


def open_image_tokenizer(config: Config, path: str | Path, key: str) -> ImageTokenizer:
    """An image tokenizer of ours or a released one; raises UserError naming the config `key`."""
    if not is_released(path):
        return load_image_tokenizer(path, key, verify=config.verify)
    model = load_vqvae(path, key, verify=config.verify)
    return ImageTokenizer(model, {**vqvae_settings(model), "image_size": config.image_tokenizer.image_size})


def model_hash(path: str | Path) -> str:
    """A hash that changes with the weights at a path, without reading them: of their manifests, or sizes and times."""
    digest = xxhash.xxh3_128()
    for file in sorted(_files_of_model(Path(path))):
        if file.name == MANIFEST:
            digest.update(file.read_bytes())
        elif file.name == BASE:
            digest.update(model_hash(file.read_text(encoding="utf-8").strip()).encode())
        else:
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _files_of_model(path: Path) -> list[Path]:
    """The files that tell a model from another: manifests, where the folder has them."""
    if path.is_file():
        return [path]
    folder = find_adapter(path) or (path / "model" if (path / "model").is_dir() else path)
    files = [file for file in folder.rglob("*") if file.is_file()]
    marked = [file for file in files if file.name in (MANIFEST, BASE)]
    return marked or files


def open_sequence_model(config: Config, path: str | Path, key: str, template: TemplateConfig) -> SequenceModel:
    """A sequence model of ours, merged with its base if it is an adapter, or a released one laid out by `template`.

    Released weights come without tokenizers: `text.model` and `image_tokenizer.path` name them.

    Raises:
        UserError: the files do not fit together or the configuration; the message names the config `key`.
    """
    if not is_released(path):
        return load_adapted(
            path, key, lambda base, of: open_sequence_model(config, base, of, template), verify=config.verify
        )
    _refuse_other_role(path, key)
    text = TextTokenizer.load(_given(config.text.model, "text.model", "cog-pretrain.model", path, key))
    tokenizer_path = _given(config.image_tokenizer.path, "image_tokenizer.path", "the tokenizer's .pt file", path, key)
    image_tokenizer = open_image_tokenizer(config, tokenizer_path, "image_tokenizer.path")
    vocabulary = Vocabulary(image_tokenizer.model.codebook_size, text.vocab_size)
    options = config.model
    model = load_transformer(
        path, num_heads=options.num_heads, norm_scope=options.norm_scope.value, key=key, verify=config.verify
    )
    settings = {
        "vocab_size": model.token_embedding.num_embeddings,
        "num_layers": len(model.blocks),
        "hidden_size": model.token_embedding.embedding_dim,
        "num_positions": model.num_positions,
    }
    configured = {name: getattr(value, "value", value) for name, value in vars(options).items()}
    _require_sizes(settings, {**configured, "vocab_size": vocabulary.size}, path, key)
    layout = layout_settings(config, template)
    if template.target == "text":  # released captioners never saw an end token; scoring one would be noise
        layout["layout"] = template.layout.removesuffix(config.compat.end_of_text).strip()
    built = build_template(layout, vocabulary)
    check_positions(built, model.num_positions)
    return SequenceModel(
        model=model,
        template=built,
        text=text,
        image_tokenizer=image_tokenizer,
        settings={
            "transformer": {**configured, **settings},
            "template": layout,
            "vocabulary": {"codebook_size": vocabulary.codebook_size, "text_vocab_size": vocabulary.text_vocab_size},
        },
    )


def _given(value: str | None, needed: str, example: str, path: str | Path, key: str) -> str:
    if value is None:
        raise UserError(f"{key}={path} holds released weights, which come without tokenizers; set {needed} ({example})")
    return value


def _require_sizes(found: dict[str, int], wanted: dict[str, Any], path: str | Path, key: str) -> None:
    for name, value in found.items():
        if value == wanted[name]:
            continue
        if name == "vocab_size":
            raise UserError(
                f"{key}={path} has a vocabulary of {value} rows, text.model and image_tokenizer.path together make "
                f"{wanted[name]}; give the tokenizers that the weights were trained with"
            )
        raise UserError(f"{key}={path} has {name}={value}, this run model.{name}={wanted[name]}; choose the same model")


def _refuse_other_role(path: str | Path, key: str) -> None:
    for name, role in _ROLES.items():
        if name in Path(path).resolve().parts and role != key and key in ("rerank_with", "upscale_with"):
            raise UserError(f"{key}={path}: {name} is not made for that; give it as {role}")
