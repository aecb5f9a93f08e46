"""Adapter folders: the matrices of a LoRA finetune, without the weights of its base model.

adapter/
  config.yaml           identity of the base, LoRA options, model options and the layout of the task
  adapter.safetensors   the trained matrices
  manifest.json         hashes of these two files
  base.txt              path of the base; correct it when the base has moved

A checkpoint of a finetune with LoRA holds the same (`training_checkpoint`), and is read like a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview_pl.checkpoints.manifest import file_hash, require_undamaged, write_manifest
from cogview_pl.checkpoints.model_folder import (
    SEQUENCE_MODEL,
    SequenceModel,
    build_template,
    build_transformer,
    load_sequence_model,
    sequence_model_config,
)
from cogview_pl.checkpoints.settings import (
    CONFIG,
    Settings,
    from_plain,
    plain,
    read_settings,
    require_types,
    unfit_named,
    write_settings,
)
from cogview_pl.checkpoints.training_checkpoint import (
    TrainingCheckpoint,
    announce,
    checkpoint_hash,
    find_checkpoint,
    read_checkpoint,
    sequence_model_in,
)
from cogview_pl.checkpoints.weights import read_weights, save_weights
from cogview_pl.durable.latest import through_latest
from cogview_pl.durable.read import UnreadableError, read_file, why_unusable
from cogview_pl.durable.write import write_text
from cogview_pl.errors import UserError
from cogview_pl.transformer.config import LoRAConfig
from cogview_pl.transformer.lora import adapter_shapes, merge
from cogview_pl.vocab import Vocabulary

FOLDER = "adapter"
BASE = "base.txt"

_WEIGHTS = "adapter.safetensors"
_KIND = "adapter"
_LONGEST_PATH = 1 << 14  # bytes of base.txt


@dataclass(frozen=True)
class Adapter:
    """Trained matrices, and the model that they belong to."""

    weights: Mapping[str, Tensor]
    """As `adapter_state` gives them."""
    lora: LoRAConfig
    transformer: Settings
    """Options of the trained model, as plain values."""
    template: Settings
    base: str
    """Path of the base model: a run folder, a model folder or a released checkpoint."""
    base_identity: str
    image_tokenizer: str
    """Identity of the image tokenizer that made the codes of its training."""


def save_adapter(folder: Path, adapter: Adapter) -> None:
    """Write an adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / _WEIGHTS, {name: tensor.cpu().contiguous() for name, tensor in adapter.weights.items()})
    write_text(folder / BASE, f"{adapter.base}\n")
    write_settings(folder, _config_of(adapter))
    write_manifest(folder, (CONFIG, _WEIGHTS))


def adapter_parts(adapter: Adapter, vocabulary: Vocabulary) -> dict[str, Any]:
    """What checkpoints of training keep of an adapter besides its weights."""
    config = sequence_model_config(adapter.transformer, adapter.template, vocabulary)
    return {
        "config": plain({"kind": SEQUENCE_MODEL, **config}),
        "adapter": plain({**_config_of(adapter), "base": adapter.base}),
    }


def _config_of(adapter: Adapter) -> dict[str, Any]:
    return {
        "kind": _KIND,
        "base_identity": adapter.base_identity,
        "image_tokenizer": adapter.image_tokenizer,
        "lora": plain(adapter.lora),
        "transformer": dict(adapter.transformer),
        "template": dict(adapter.template),
    }


def find_adapter(path: str | Path) -> Path | None:
    """The adapter at a path; None if there is none.

    It is a folder: the path itself, or `adapter/` in a run folder without `model/`. Or it is a checkpoint of a finetune
    with LoRA: the path itself, or `last.ckpt` of a run that has not ended.
    """
    path = through_latest(path)
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        return checkpoint if _holds_adapter(checkpoint) else None
    folders = [path] if (path / "model").is_dir() else [path, path / FOLDER]
    return next((folder for folder in folders if (folder / _WEIGHTS).is_file()), None)


def load_adapted(
    path: str | Path,
    key: str = "init_from",
    open_base: Callable[[str, str], SequenceModel] | None = None,
    *,
    verify: bool = True,
) -> SequenceModel:
    """Read a sequence model from a run folder, a model folder, a checkpoint or an adapter folder (with its base).

    The base must have the weights that the adapter was trained with (compared by a hash of all of them).

    Args:
        path: the folder or file.
        key: config key that error messages name.
        open_base: reads the base at a path, naming a key in errors; None: this function reads it.
        verify: compare files with their hashes; see `load_model`.

    Raises:
        UserError: the folder is missing or damaged, or the base has moved or has other weights.
    """
    folder = find_adapter(path)
    if folder is None:
        load = load_sequence_model if find_checkpoint(path) is None else sequence_model_in
        return load(path, key, verify=verify)
    find_base(folder, key)
    adapter = _read(folder, verify)
    if folder.is_file():
        announce(_checkpoint(folder), path, key)
    mend = _mend(folder)
    base = open_base(adapter.base, f"base of {key}") if open_base else load_adapted(adapter.base, key, verify=verify)
    if base.identity != adapter.base_identity:
        raise UserError(
            f"{key}={path}: its base, {adapter.base}, holds other weights than the adapter was trained with; {mend}"
        )
    if base.image_tokenizer.identity != adapter.image_tokenizer:
        raise UserError(
            f"{key}={path}: its base, {adapter.base}, has another image tokenizer than the adapter was trained with; "
            "use the model/ of that run"
        )
    return _adapted(adapter, base, folder)


def read_adapter_settings(folder: Path, *, verify: bool = True) -> dict[str, Settings]:
    """Options `transformer` and `template` of an adapted model, as plain values; no weights.

    Args:
        folder: an adapter (`find_adapter`).
        verify: compare the settings with their hash.

    Raises:
        UserError: the folder is damaged.
    """
    if verify and folder.is_dir():
        require_undamaged(folder, (CONFIG,))
    config = _read_config(folder)
    with _unfit_named(folder):
        return {name: dict(config[name]) for name in ("transformer", "template")}


def find_base(folder: Path, key: str) -> str:
    """Path of the base model of an adapter.

    Args:
        folder: an adapter (`find_adapter`).
        key: config key that error messages name.

    Raises:
        UserError: a base in the chain of bases is missing, or the chain is a circle.
    """
    met: list[Path] = []
    current: Path | None = folder
    while current is not None:
        if (here := current.resolve()) in met:
            raise UserError(f"{key}={folder}: the adapter is named as its own base; {_mend(current)}")
        met.append(here)
        base = _base_of(current)
        if not through_latest(base).exists():
            raise UserError(f"{key}={folder}: the adapter's base, {base}, {why_unusable(base)}; {_mend(current)}")
        current = find_adapter(base)
    return _base_of(folder)


def _base_of(folder: Path) -> str:
    if folder.is_file():
        with _unfit_named(folder):
            return str(_read_config(folder)["base"])
    file = folder / BASE
    try:
        base = read_file(file, _LONGEST_PATH).decode("utf-8").strip()
        if not base or not base.isprintable():
            raise ValueError(f"it holds {base[:40]!r}")
    except (UnreadableError, ValueError) as error:
        raise UserError(f"{file} is no path ({error}); {_mend(folder)}") from error
    return base


def _mend(folder: Path) -> str:
    if folder.is_file():
        return "put its base model back, or give the model/ of the run"
    return f"write the path of its base model into {folder / BASE}"


def _read(folder: Path, verify: bool) -> Adapter:
    if folder.is_file():
        weights: Mapping[str, Tensor] = _checkpoint(folder, verify).weights
    else:
        if verify:
            require_undamaged(folder, (CONFIG, _WEIGHTS))
        weights = read_weights(folder / _WEIGHTS, finite=verify)
    config, base = _read_config(folder), _base_of(folder)
    with _unfit_named(folder):
        names = ("transformer", "template", "base_identity", "image_tokenizer")
        values = require_types(Adapter, {name: config[name] for name in names})
        return Adapter(weights=weights, base=base, lora=from_plain(LoRAConfig, config["lora"]), **values)


def _read_config(folder: Path) -> dict[str, Any]:
    config = dict(_checkpoint(folder).parts["adapter"]) if folder.is_file() else read_settings(folder)
    if config.get("kind") != _KIND:
        raise UserError(f"{folder / CONFIG} is damaged (it is of kind {config.get('kind')}); copy the folder again")
    return config


def _checkpoint(file: Path, verify: bool = False) -> TrainingCheckpoint:
    return read_checkpoint(file, "checkpoint", SEQUENCE_MODEL, verify=verify)


def _holds_adapter(file: Path) -> bool:
    """Whether a checkpoint is of a finetune with LoRA; False for files that cannot be read, whose reader says why."""
    try:
        return isinstance(_checkpoint(file).parts.get("adapter"), dict)
    except UserError:
        return False


def _unfit_named(folder: Path) -> AbstractContextManager[None]:
    return unfit_named(folder, "file") if folder.is_file() else unfit_named(folder / CONFIG)


def _adapted(adapter: Adapter, base: SequenceModel, folder: Path) -> SequenceModel:
    """The base with the adapter added to its weights, in their memory, and with the layout of the adapter's task."""
    vocabulary = base.settings["vocabulary"]
    with _unfit_named(folder):
        wanted = adapter_shapes(base.model, adapter.lora)
        template = build_template(adapter.template, Vocabulary(**vocabulary))
        if adapter.transformer["num_layers"] != len(base.model.blocks):
            raise ValueError(
                f"num_layers is {adapter.transformer['num_layers']}, the base has {len(base.model.blocks)}"
            )
        with torch.device("meta"):
            model = build_transformer(adapter.transformer)
    found = {name: tuple(tensor.shape) for name, tensor in adapter.weights.items()}
    if found != wanted:
        file = folder if folder.is_file() else folder / _WEIGHTS
        raise UserError(f"{file} does not fit its config.yaml or is damaged; copy the folder again")
    own = checkpoint_hash(folder) if folder.is_file() else file_hash(folder / _WEIGHTS)
    identity = f"{base.identity} {own}"
    with _unfit_named(folder):
        merge(base.model, adapter.weights, adapter.lora.alpha)
        model.load_state_dict(base.model.state_dict(), assign=True)
    return SequenceModel(
        model=model.eval(),
        template=template,
        text=base.text,
        image_tokenizer=base.image_tokenizer,
        settings={"transformer": adapter.transformer, "template": adapter.template, "vocabulary": vocabulary},
        merged_from=identity,
    )
