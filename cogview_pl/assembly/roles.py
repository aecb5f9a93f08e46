"""Roles of sequence models. Each role has a key that names its model, a task that trains it, and a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cogview_pl.assembly.models import open_sequence_model
from cogview_pl.assembly.options import ModelOptions
from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.checkpoints.model_hash import model_hash
from cogview_pl.checkpoints.settings import plain
from cogview_pl.generation.config import Quantization, Sampling
from cogview_pl.lit.bars import status
from cogview_pl.runs.run_folder import predecessor
from cogview_pl.vocab import Template, caption_slots, magnify_slots
from cogview_pl.vocab.config import TemplateConfig


class Role(NamedTuple):
    """A use of a sequence model."""

    key: str
    """Key of the configuration that names the model."""
    task: str
    """Task that trains the model; its newest run is used if the key is null."""
    require: Callable[[Template], object]
    """Raises UserError for a wrong layout."""


def _any_layout(template: Template) -> None:
    """`task=generate` accepts models that make images from texts or from images, and captioners."""


GENERATOR = Role("init_from", "pretrain", _any_layout)
CAPTION_WRITER = Role("init_from", "caption", _any_layout)
EDITOR = Role("init_from", "style_transfer", _any_layout)
CAPTIONER = Role("rerank_with", "caption", caption_slots)
UPSCALER = Role("upscale_with", "super_resolution", magnify_slots)


def generating_role(prompts: object, images: object, *, completes: bool) -> Role:
    """The role of the model that task=generate loads: by the keys that are given, and whether it completes images."""
    if images is None or completes:
        return GENERATOR
    return CAPTION_WRITER if prompts is None else EDITOR


def hash_of_role(role: Role, outputs: str, given: str | None) -> str:
    """Hash of the model of a role; arguments as for `open_role`."""
    return model_hash(predecessor(outputs, role.task, role.key, given))


def inference_settings(
    precision: Mapping[str, Any], quantization: Quantization | None, *, sampler: Sampling, **more: object
) -> dict[str, object]:
    """Settings that the results of a task depend on, besides its models and inputs; a resumed run compares them.

    `engine_settings` has the engine that `sampler.engine` leads to.
    """
    return {
        **more,
        "quantization": quantization and quantization.value,
        "precision": precision.get("precision"),
        **{f"sampler.{key}": value for key, value in plain(sampler).items() if key != "engine"},
    }


def open_role(role: Role, options: ModelOptions, given: str | None, template: TemplateConfig) -> SequenceModel:
    """The model of a role: the one `given`, or the newest of the role's task.

    Args:
        role: the role.
        options: options of the run.
        given: value of the role's key.
        template: layout of released weights; model folders carry their own.

    Raises:
        UserError: there is none, it cannot be read, or it has another layout.
    """
    path = predecessor(options.outputs, role.task, role.key, given)
    status("reading the model …")
    model = open_sequence_model(options, path, role.key, template)
    role.require(model.template)
    return model
