"""Checks of what a Python user gives to `CogView`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from cogview_pl.assembly.roles import CAPTIONER, GENERATOR, UPSCALER, Role
from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.errors import UserError
from cogview_pl.generation.pipeline import ImageGenerator
from cogview_pl.generation.rerank import Captioner
from cogview_pl.generation.super_resolution.upscale import Upscaler
from cogview_pl.limits import Limit
from cogview_pl.vocab import TextSlot, makes_images

_Model = TypeVar("_Model", ImageGenerator, Captioner, Upscaler)


def home(path: str | Path) -> str:
    """A path in which `~` is the home folder."""
    return os.path.expanduser(path)


def role_of(model: SequenceModel) -> Role:
    """What a model is used for; raises UserError for a layout without a use."""
    if makes_images(model.template):
        return GENERATOR
    role = CAPTIONER if isinstance(model.template.target, TextSlot) else UPSCALER
    role.require(model.template)
    return role


def required(model: _Model | None, role: Role) -> _Model:
    """The model; raises UserError where there is none."""
    if model is None:
        key = "path" if role == GENERATOR else role.key
        raise UserError(f"{key}: this needs a model of task={role.task}; give it to CogView.load")
    return model


def require_number(name: str, value: int, limit: Limit) -> None:
    """Raises UserError for a number out of its range."""
    if not limit.holds(value):
        raise UserError(f"{name}={value} must be {limit.words}")


def one_for_each(prompts: str | Sequence[str], images: int) -> list[str]:
    """A prompt for each image: the same, or their own; raises UserError for another number of prompts."""
    texts = [prompts] * images if isinstance(prompts, str) else list(prompts)
    if len(texts) != images:
        raise UserError(f"prompts: {len(texts)} for {images} images; give one for each of them")
    return texts


def new_folder(folder: str | Path) -> Path:
    """A new or empty folder; raises UserError if it has files."""
    path = Path(home(folder))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"folder={path} exists and is not empty; choose another one")
    path.mkdir(parents=True, exist_ok=True)
    return path
