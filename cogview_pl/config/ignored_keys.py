"""Refuses keys on the command line that would have no effect, because a user who gives them expects another result.

Keys of training (`trainer`, `optimizer`, `data`, …) are not among them: people keep them on the command line of all
tasks. A chain hands its keys to all stages, so they are not checked there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from cogview_pl.config.choices import Verb
from cogview_pl.errors import UserError

_GENERATED = ("prompts", "num_images_per_prompt", "top_n", "complete")
_READ = ("images", "pairs", "num_captions")
_ROLES = ("rerank_with", "upscale_with")
_TRAINED = ("starts_from", "sequences", "lora", "token_store")
_PARTS = ("token_store.parts", "token_store.part", "token_store.join")

_TOKENIZER = "image_tokenizer.path names the image tokenizer"
UNUSED: dict[Verb, dict[str, str]] = {
    Verb.fit_image_tokenizer: {
        "image_tokenizer.path": "init_from names a model to start from",
        "text": "",
        "template": "",
        "quantization": "",
        **dict.fromkeys((*_GENERATED, *_READ, *_ROLES, "starts_from", "sequences", "token_store"), ""),
    },
    Verb.fit_sequence_model: {
        "quantization": "",
        **dict.fromkeys((*_GENERATED, *_READ, *_ROLES), ""),
        **dict.fromkeys(_PARTS, "task=tokenize makes and joins parts"),
    },
    Verb.tokenize: {
        "init_from": _TOKENIZER,
        "images": "data.root names the images",
        "pairs": "data.root names the images",
        "num_captions": "",
        "quantization": "",
        "sampler": "",
        **dict.fromkeys((*_GENERATED, *_ROLES, "starts_from", "sequences", "lora"), ""),
    },
    Verb.generate: {
        "pairs": "prompts or images name the input",
        "num_captions": "num_images_per_prompt is the number of images",
        **dict.fromkeys(_TRAINED, ""),
    },
    Verb.magnify: {
        "init_from": "upscale_with names the model",
        "rerank_with": "",
        "prompts": "pairs names images with their prompts",
        "num_images_per_prompt": "",
        "top_n": "",
        "num_captions": "",
        "sampler.guidance": "guidance is for task=generate",
        "sampler.algorithm": "windows are decoded side by side",
        "sampler.drafts": "",
        "complete": "task=generate completes images",
        **dict.fromkeys(_TRAINED, ""),
    },
    Verb.rerank: {
        "init_from": "rerank_with names the model",
        "upscale_with": "",
        "images": "pairs names images with their prompts",
        "prompts": "pairs names images with their prompts",
        "num_images_per_prompt": "",
        "top_n": "",
        "sampler.temperature": "",
        "sampler.top_k": "",
        "sampler.top_p": "",
        "sampler.guidance": "",
        "sampler.algorithm": "",
        "sampler.consistency": "",
        "complete": "",
        **dict.fromkeys(_TRAINED, ""),
    },
    Verb.fit_features: {
        "init_from": "the network starts at random",
        "sampler": "",
        "quantization": "",
        **dict.fromkeys((*_GENERATED, *_READ, *_ROLES, *_TRAINED), ""),
    },
    Verb.evaluate: {
        "num_captions": "",
        "complete": "task=generate completes images; then pairs names its run",
        **dict.fromkeys(_TRAINED, ""),
    },
    Verb.convert: {
        "init_from": "convert.source names the model",
        "sampler": "",
        "quantization": "",
        **dict.fromkeys((*_GENERATED, *_READ, *_ROLES, *_TRAINED), ""),
    },
}
"""Verb → keys and groups that it does not read, with what to give instead."""

TOY_WORLD = "cogview_pl.toy_world.dataset.ToyDataset"

OF_MODEL_FOLDERS = tuple(
    f"{group}." for group in ("text", "template", "rerank_template", "upscale_template", "compat", "model")
) + tuple(
    f"image_tokenizer.{name}"
    for name in ("path", "downsampling", "hidden_size", "residual_blocks", "codebook_dim", "codebook_size")
)
"""Beginnings of keys that released weights need; a model folder has its own values and tokenizers.

The choice of a group, such as `model=small`, may stay on all command lines of a project.
"""
_MODELS: dict[Verb, dict[str, tuple[str, ...]]] = {
    Verb.generate: {"init_from": ("pretrain", "caption", "style_transfer"), "rerank_with": (), "upscale_with": ()},
    Verb.magnify: {"upscale_with": ("super_resolution",)},
    Verb.rerank: {"rerank_with": ("caption",)},
}
"""Verb → keys that name its models → tasks whose newest run a model comes from where the key is null."""


def refuse_ignored_keys(config: DictConfig, words: Sequence[str]) -> None:
    """Raises UserError that names a key of `words` without an effect on the task.

    Args:
        config: the composed configuration.
        words: words of the command line.
    """
    given = [word.lstrip("+").partition("=")[0] for word in words if "=" in word and not word.startswith(("-", "~"))]
    for key in given:
        for name, instead in UNUSED.get(config.verb, {}).items():
            if key == name or key.startswith(f"{name}."):
                raise UserError(_without_effect(key, config.task, instead))
    terms = [key for key in given if key.startswith("features.terms")]
    if config.verb == Verb.fit_features and terms and config.data._target_ == TOY_WORLD:
        raise UserError(_without_effect(terms[0], config.task, "on data=toy it learns styles and attributes"))
    models = _MODELS.get(config.verb, {})
    decided = [key for key in given if key.startswith(OF_MODEL_FOLDERS)]
    if models and decided and not _uses_released_weights(config, models):
        raise UserError(_without_effect(decided[0], config.task, f"the model folder in {next(iter(models))} decides"))


def _without_effect(key: str, task: str, why: str) -> str:
    return f"{key} has no effect on task={task}{f': {why}' if why else ''}; leave {key} out"


def _uses_released_weights(config: DictConfig, models: Mapping[str, Sequence[str]]) -> bool:
    """Whether a model of the task, or the base of an adapter among them, is a released checkpoint or in downloads."""
    from cogview_pl.assembly.found_weights import may_hold_downloads, released_base  # here, because they import torch

    for key, tasks in models.items():
        newest = [Path(config.outputs, task, "latest") for task in tasks]
        for path in newest if config[key] is None else [Path(config[key])]:
            if may_hold_downloads(path) or released_base(path, key) is not None:
                return True
    return False
