"""Opens the models that a configuration names: run folders, or released checkpoints as they were downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogview_pl.assembly.options import ModelOptions
from cogview_pl.checkpoints.adapter_folder import load_adapted
from cogview_pl.checkpoints.model_folder import (
    ImageTokenizer,
    SequenceModel,
    build_template,
    load_image_tokenizer,
)
from cogview_pl.checkpoints.released import is_released, load_transformer, load_vqvae, vqvae_settings
from cogview_pl.checkpoints.settings import plain
from cogview_pl.checkpoints.training_checkpoint import find_checkpoint, image_tokenizer_in
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import predecessor
from cogview_pl.vocab import Template, TextTokenizer, Vocabulary
from cogview_pl.vocab.config import TemplateConfig
from cogview_pl.vqvae.config import EXTERNAL_KEY, ImageTokenizerConfig
from cogview_pl.vqvae.external import EXTERNAL, ExternalTokenizer, build_external, external_settings

_ROLES = {"cogview-base": "init_from", "cogview-sr": "upscale_with", "cogview-caption": "rerank_with"}
"""Name of a released folder → key that it is made for; its files do not tell. `init_from` takes any of them."""


def check_positions(template: Template, num_positions: int) -> None:
    """Raises UserError if the longest sequence of a template needs more positions than the model has."""
    if template.num_positions > num_positions:
        raise UserError(
            f"model.num_positions={num_positions}: the longest sequence needs {template.num_positions} "
            "(text.max_length plus the codes); raise model.num_positions, choose a larger model, or lower "
            "text.max_length"
        )


def open_image_tokenizer(options: ModelOptions, path: str | Path, key: str) -> ImageTokenizer:
    """An image tokenizer from a run folder, a checkpoint or a released file; raises UserError naming the `key`."""
    if find_checkpoint(path) is not None:
        return image_tokenizer_in(path, key, verify=options.verify)
    if not is_released(path):
        return load_image_tokenizer(path, key, verify=options.verify)
    model = load_vqvae(path, key, verify=options.verify)
    return ImageTokenizer(model, {**vqvae_settings(model), "image_size": options.image_tokenizer.image_size})


def newest_image_tokenizer(options: ModelOptions) -> ImageTokenizer:
    """The tokenizer of `image_tokenizer.path`, else the external one, else that of the newest vqvae run.

    Raises UserError if there is none.
    """
    key, images = "image_tokenizer.path", options.image_tokenizer
    if images.external is not None and images.path is None:
        return configured_external(images)
    found = open_image_tokenizer(options, predecessor(options.outputs, "vqvae", key, images.path), key)
    if images.external is not None and not isinstance(found.model, ExternalTokenizer):
        raise UserError(f"{key}={images.path} holds no tokenizer of {EXTERNAL_KEY}; leave one of the two keys out")
    return found


def configured_external(options: ImageTokenizerConfig) -> ImageTokenizer:
    """The image tokenizer of another project that `image_tokenizer.external` names, as its class makes it."""
    node = plain(options.external)
    model = build_external({EXTERNAL: node})
    if options.image_size % model.downsampling:
        raise UserError(
            f"image_tokenizer.image_size={options.image_size} is no multiple of downsampling={model.downsampling} of "
            f"{EXTERNAL_KEY}._target_={node['_target_']}; choose another size"
        )
    return ImageTokenizer(model.eval(), {**external_settings(model, node), "image_size": options.image_size})


def open_sequence_model(options: ModelOptions, path: str | Path, key: str, template: TemplateConfig) -> SequenceModel:
    """A sequence model from a run folder or a checkpoint (an adapter is merged into its base), or a released one.

    `template` is the layout of released weights.

    Released weights come without tokenizers: `text.model` and `image_tokenizer.path` name them.

    Raises:
        UserError: the files do not fit each other or the configuration; the message names the config `key`.
    """
    if not is_released(path):
        return load_adapted(
            path, key, lambda base, of: open_sequence_model(options, base, of, template), verify=options.verify
        )
    _refuse_other_role(path, key)
    text = TextTokenizer.load(_given(options.text.model, "text.model", "cog-pretrain.model", path, key))
    tokenizer_path = _given(options.image_tokenizer.path, "image_tokenizer.path", "the tokenizer's .pt file", path, key)
    image_tokenizer = open_image_tokenizer(options, tokenizer_path, "image_tokenizer.path")
    vocabulary = Vocabulary(image_tokenizer.model.codebook_size, text.vocab_size)
    sizes = options.transformer
    model = load_transformer(
        path, num_heads=sizes.num_heads, norm_scope=sizes.norm_scope, key=key, verify=options.verify
    )
    settings = {
        "vocab_size": model.token_embedding.num_embeddings,
        "num_layers": len(model.blocks),
        "hidden_size": model.token_embedding.embedding_dim,
        "num_positions": model.num_positions,
    }
    configured = plain(sizes)
    _require_sizes(settings, {**configured, "vocab_size": vocabulary.size}, path, key)
    layout = options.layout(template)
    if template.target == "text":  # released captioners never saw an end token, so its score would be noise
        layout["layout"] = template.layout.removesuffix(options.compat.end_of_text).strip()
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


def require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], source: str) -> None:
    """Raises UserError naming the first setting of the model to start from that differs from this run."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(f"{source} has {key}={found.get(key)}, this run {value}; choose the same model")


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
