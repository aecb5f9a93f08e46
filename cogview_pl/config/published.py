"""The released files of 2021: how to get them, and the command to type once they are there."""

from __future__ import annotations

import re
from collections.abc import Sequence

from omegaconf import DictConfig

from cogview_pl.config.choices import Verb
from cogview_pl.errors import UserError
from cogview_pl.runs.command import command

SIZE = (48, 2560)
"""Layers and hidden size of the released transformers."""
PUBLISHED_VQVAE = (512, 256, 8192)
"""Hidden size, codebook dimension and codebook size of the released image tokenizer."""
PUBLISHED_IMAGE_SIZE = 256

_FOLDER = "weights"
_PLAIN = re.compile(r"(?<=[=,\[])'([\w./-]+)'(?=[,\]]|$)")  # quoted for Hydra, though it needs no quotes
_RECIPES = ("style", "super_resolution", "caption")  # tasks with a recipe experiment=cogview_4b_TASK_lora
_FILES = (  # key that needs it, name, content, size
    ("init_from", "cogview-base/", "text to image, 3.93 G parameters in fp16", "7.86 GB"),
    ("upscale_with", "cogview-sr/", "super-resolution, of the same shape", "7.86 GB"),
    ("rerank_with", "cogview-caption/", "captions, of the same shape", "7.86 GB"),
    ("", "a .pt file", "image tokenizer: VQ-VAE, 8,192 codes, 256 px to 32x32", "0.09 GB"),
    ("", "cog-pretrain.model", "text tokenizer: SentencePiece, 50,000 tokens", "1.02 MB"),
)


def is_released_size(config: DictConfig) -> bool:
    """Whether a configuration describes a transformer of the released size."""
    return (config.model.num_layers, config.model.hidden_size) == SIZE


def weights_missing(config: DictConfig, key: str, given: Sequence[str], reason: str) -> UserError:
    """An error that says which released files a run needs, where they were published, and what to type next.

    Args:
        config: the composed configuration.
        key: key that is to name the weights.
        given: overrides on the command line.
        reason: what was found instead.
    """
    rows = [
        f"  {name:<20}{content:<56}{size:<10}{'needed' if needed in ('', key) else ''}".rstrip()
        for needed, name, content, size in _FILES
    ]
    return UserError(
        f"task={config.task} needs the weights of model=cogview_4b, and {reason}",
        details=(
            "",
            "They were published in 2021 with https://github.com/THUDM/CogView (Apache-2.0). Nothing downloads them "
            "for you:",
            "",
            *rows,
            "",
            f"Unpack them into one folder, such as {_FOLDER}/, under these names, and type",
            "",
            f"  {command(_next_words(config, key, given))}",
            "",
            "With plan=true it prints which cards it fits. docs/released-weights.md goes on from there.",
        ),
    )


def _next_words(config: DictConfig, key: str, given: Sequence[str]) -> list[str]:
    """The overrides, with the folder of the weights, a recipe instead of the task, and data where there are none."""
    names = {word.lstrip("+").partition("=")[0] for word in given}
    left_out = {key, "model"}
    begin: list[str] = []
    if config.task in _RECIPES and "experiment" not in names:
        left_out.add("task")
        begin = [f"experiment=cogview_4b_{config.task}_lora"]
    kept = [_PLAIN.sub(r"\1", word) for word in given if word.partition("=")[0] not in left_out]
    task = [word for word in kept if word.startswith("task=")]
    words = [*task, *begin, f"{key}={_FOLDER}", *(word for word in kept if word not in task)]
    if config.verb == Verb.fit_sequence_model and not any(name.partition(".")[0] == "data" for name in names):
        words += [] if begin or "experiment" in names else ["data=folder"]
        words.append("data.styles={油画: DIR}" if config.task == "style" else "data.root=DIR")
    return words
