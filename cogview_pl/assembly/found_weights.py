"""What the files of a sequence model tell about it, as values of the configuration. Weights are not read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from cogview_pl.assembly.model_specs import saved_model
from cogview_pl.checkpoints.adapter_folder import find_adapter, find_base, read_adapter_settings
from cogview_pl.checkpoints.model_folder import find_model_folder
from cogview_pl.checkpoints.released import is_released, transformer_sizes, vqvae_settings_of
from cogview_pl.checkpoints.training_checkpoint import find_checkpoint
from cogview_pl.data.token_store.header import TokenStoreHeader
from cogview_pl.errors import UserError
from cogview_pl.runs.record import is_run
from cogview_pl.transformer.config import Norm
from cogview_pl.vocab import Template, TextTokenizer, Vocabulary

_SIZES = ("num_layers", "hidden_size", "num_heads", "num_positions", "norm", "dropout")
_COMMANDS = 4  # tokens of a released sequence besides text and codes
_DOWNSAMPLING = 8
_RELEASED_DROPOUT = 0.1  # of the training of the original


@dataclass(frozen=True)
class FoundWeights:
    """Values that follow from the files of a model.

    Attributes:
        model: fields of `TransformerConfig`; `num_heads` is missing where the files do not tell it.
        tokenizers: values of `image_tokenizer.…` and `text.…`, by their keys.
        codebook_size: number of image codes.
        text_length: capacity of the text slot.
        text: reads the text tokenizer.
    """

    model: dict[str, Any]
    tokenizers: dict[str, Any]
    codebook_size: int
    text_length: int
    text: Callable[[], TextTokenizer]

    def fitting_text_length(self, layout: dict[str, Any]) -> int:
        """The capacity of the text slot with which the sequences of a layout fit into the positions.

        It is `text_length`, or less. The layout has the arguments of `Template` but for `vocabulary`, `text_length`.
        """
        template = Template(**layout, vocabulary=Vocabulary(1, 1), text_length=self.text_length)
        return self.text_length - max(0, template.num_positions - self.model["num_positions"])


def released_base(path: Path, key: str) -> Path | None:
    """Released weights at a path, or those that an adapter at the path was trained for; None for other models."""
    adapter = find_adapter(path)
    if adapter is not None:
        return released_base(Path(find_base(adapter, key)), key)
    return path if is_released(path) else None


def may_hold_downloads(path: Path) -> bool:
    """Whether a path is a folder, and no run, model, adapter, checkpoint or released transformer."""
    if not path.is_dir() or is_released(path) or is_run(path):
        return False
    if find_adapter(path) is not None or find_checkpoint(path) is not None:
        return False
    try:
        find_model_folder(path, "")
    except UserError:
        return True
    return False


def found_weights(path: Path, key: str, *, text: str | None, images: str | None, verify: bool) -> FoundWeights:
    """What the files at a path tell.

    Args:
        path: a run or model folder, an adapter, a checkpoint of training, or a released transformer.
        key: config key that error messages name.
        text, images: `text.model` and `image_tokenizer.path`, for released weights.
        verify: compare the settings in model folders with their hashes.

    Raises:
        UserError: there is no sequence model, or a file cannot be read.
    """
    adapter = find_adapter(path)
    if adapter is not None:
        base = found_weights(Path(find_base(adapter, key)), key, text=text, images=images, verify=verify)
        own = read_adapter_settings(adapter, verify=verify)
        return replace(base, model=_sizes(own["transformer"]), text_length=own["template"]["text_length"])
    saved = saved_model(path, key, verify=verify)
    if saved is None:
        assert text is not None and images is not None
        return _released(path, key, Path(text), Path(images))
    return FoundWeights(
        model=_sizes(saved.settings["transformer"]),
        tokenizers={
            "image_tokenizer.image_size": saved.images.edge,
            "image_tokenizer.downsampling": saved.images.settings["downsampling"],
        },
        codebook_size=saved.settings["vocabulary"]["codebook_size"],
        text_length=saved.settings["template"]["text_length"],
        text=saved.text,
    )


def saved_sizes(path: Path, key: str, *, verify: bool) -> dict[str, Any]:
    """Options of the transformer at a path, by its settings or, of released weights, by the shapes of its tensors."""
    adapter = find_adapter(path)
    if adapter is not None:
        return dict(read_adapter_settings(adapter, verify=verify)["transformer"])
    saved = saved_model(path, key, verify=verify)
    return dict(transformer_sizes(path, key) if saved is None else saved.settings["transformer"])


def why_no_replay(store: Path | None, found: FoundWeights) -> str | None:
    """Why a model cannot replay samples of the newest token store; None if nothing speaks against it."""
    if store is None:
        return "there is no finished run of task=tokenize"
    header = TokenStoreHeader.load(store / "token_store")
    if header.text_tokenizer != found.text().identity or header.codebook_size != found.codebook_size:
        return f"the newest token store, {store}, was made with other tokenizers than the weights"
    return None


def _sizes(transformer: Mapping[str, Any]) -> dict[str, Any]:
    return {name: transformer[name] for name in _SIZES if name in transformer}


def _released(path: Path, key: str, text: Path, images: Path) -> FoundWeights:
    sizes = transformer_sizes(path, key)
    del sizes["vocab_size"]  # the tokenizers make it, and are compared with it when the weights are read
    settings = vqvae_settings_of(images)
    del settings["quantizer"]
    # Grids have 8, 16, 32 or 64 codes along an edge: the largest one that leaves positions for the text.
    grid = 2 ** int(math.log2(max(sizes["num_positions"] - _COMMANDS - 1, 1)) / 2)
    read_text = partial(_text, text, text.stat().st_mtime_ns if text.is_file() else 0)
    return FoundWeights(
        model={**sizes, "norm": Norm.sandwich.value, "dropout": _RELEASED_DROPOUT},
        tokenizers={
            **{f"image_tokenizer.{name}": value for name, value in settings.items()},
            "image_tokenizer.image_size": grid * _DOWNSAMPLING,
            "text.vocab_size": read_text().vocab_size,
        },
        codebook_size=settings["codebook_size"],
        text_length=sizes["num_positions"] - grid**2 - _COMMANDS,
        text=read_text,
    )


@cache
def _text(file: Path, changed: int) -> TextTokenizer:
    """A text tokenizer, kept until its file changes: a plan reads it for every suggestion, and a large one is slow."""
    return TextTokenizer.load(file)
