"""Adapter folders: what a LoRA finetune changed, without the weights that it started from.

adapter/
  config.yaml           where the base is and what it holds, rank, alpha and targets, and the layout of the task
  adapter.safetensors   the trained matrices
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from yaml import YAMLError

from cogview_pl.checkpoints.store import SequenceModel, Settings, build_template, load_sequence_model
from cogview_pl.errors import UserError
from cogview_pl.transformer import Transformer
from cogview_pl.transformer.lora import adapter_shapes, merge
from cogview_pl.vocab import Vocabulary

FOLDER = "adapter"

_CONFIG, _WEIGHTS = "config.yaml", "adapter.safetensors"
_KIND = "adapter"


@dataclass(frozen=True)
class Adapter:
    """Trained matrices, and what they belong to."""

    weights: Mapping[str, Tensor]
    """As `adapter_state` gives them."""
    rank: int
    alpha: float
    targets: list[str]
    transformer: Settings
    """Constructor arguments of the model that was trained."""
    template: Settings
    base: str
    """Path of the model that it was trained beside: a run folder, a model folder or a released checkpoint."""
    base_identity: str
    image_tokenizer: str
    """Identity of the image tokenizer whose codes it was trained on."""


def save_adapter(folder: Path, adapter: Adapter) -> None:
    """Write an adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in adapter.weights.items()}, folder / _WEIGHTS)
    config = {
        "kind": _KIND,
        "base": {"path": adapter.base, "identity": adapter.base_identity},
        "image_tokenizer": adapter.image_tokenizer,
        "lora": {"rank": adapter.rank, "alpha": adapter.alpha, "targets": adapter.targets},
        "transformer": dict(adapter.transformer),
        "template": dict(adapter.template),
    }
    OmegaConf.save(OmegaConf.create(config), folder / _CONFIG)


def find_adapter(path: str | Path) -> Path | None:
    """The adapter folder that a path means: itself, or `adapter/` in a run folder without a `model/`; None: neither."""
    path = Path(path)
    folders = [path] if (path / "model").is_dir() else [path, path / FOLDER]
    return next((folder for folder in folders if (folder / _WEIGHTS).is_file()), None)


def load_adapted(
    path: str | Path,
    key: str = "init_from",
    open_base: Callable[[str, str], SequenceModel] | None = None,
) -> SequenceModel:
    """Read a sequence model from a run folder, a model folder or an adapter folder, whose base is read as well.

    The weights of a base are compared with those that the adapter was trained beside (a hash of all of them).

    Args:
        path: the folder.
        key: of the configuration, for errors.
        open_base: reads the base at a path, naming a key in errors; None: as this function does.

    Raises:
        UserError: no such folder, a damaged one, or the base has moved or is another.
    """
    folder = find_adapter(path)
    if folder is None:
        return load_sequence_model(path, key)
    adapter = _read(folder, key)
    _require_base(adapter.base, folder, key)
    mend = _mend(folder)
    base = (open_base or load_adapted)(adapter.base, f"base of {key}")
    if base.identity != adapter.base_identity:
        raise UserError(
            f"{key}={path}: its base, {adapter.base}, holds other weights than the adapter was trained beside; {mend}"
        )
    if base.image_tokenizer.identity != adapter.image_tokenizer:
        raise UserError(
            f"{key}={path}: its base, {adapter.base}, has another image tokenizer than the adapter was trained with; "
            "use the model/ of that run"
        )
    return _adapted(adapter, base, folder)


def read_base(folder: Path, key: str) -> tuple[dict[str, Settings], str]:
    """Constructor arguments `transformer` and `template` of an adapted model, and the path of its base; no weights.

    Args:
        folder: as `find_adapter` gives it.
        key: of the configuration, for errors.

    Raises:
        UserError: the folder is damaged, or the base has moved.
    """
    with _damage_named(folder, key):
        config = _read_config(folder)
        settings: dict[str, Settings] = {name: dict(config[name]) for name in ("transformer", "template")}
        base = str(config["base"]["path"])
    _require_base(base, folder, key)
    return settings, base


def _require_base(base: str, folder: Path, key: str) -> None:
    if not Path(base).exists():
        raise UserError(f"{key}={folder}: the adapter's base, {base}, does not exist; {_mend(folder)}")
    if find_adapter(base) == folder.resolve():
        raise UserError(f"{key}={folder}: the adapter is named as its own base; {_mend(folder)}")


def _mend(folder: Path) -> str:
    return f"write the path of the model that it was trained beside into base.path of {folder / _CONFIG}"


def _read(folder: Path, key: str) -> Adapter:
    with _damage_named(folder, key):
        config = _read_config(folder)
        return Adapter(
            weights=load_file(folder / _WEIGHTS),
            **config["lora"],
            transformer=config["transformer"],
            template=config["template"],
            base=str(config["base"]["path"]),
            base_identity=config["base"]["identity"],
            image_tokenizer=config["image_tokenizer"],
        )


def _read_config(folder: Path) -> Any:
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / _CONFIG))
    if config["kind"] != _KIND:
        raise ValueError(f"it is of kind {config['kind']}")
    return config


@contextmanager
def _damage_named(folder: Path, key: str) -> Iterator[None]:
    try:
        yield
    except (YAMLError, OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}={folder} is a damaged adapter ({reason}); copy the run again") from error


def _adapted(adapter: Adapter, base: SequenceModel, folder: Path) -> SequenceModel:
    """The base with the adapter added to its weights, in their memory, and laid out as in the adapter's task."""
    wanted = adapter_shapes(base.model, rank=adapter.rank, targets=adapter.targets)
    found = {name: tuple(tensor.shape) for name, tensor in adapter.weights.items()}
    if found != wanted:
        raise UserError(f"{folder / _WEIGHTS} does not fit its config.yaml or is damaged; copy the run again")
    with torch.device("meta"):
        model = Transformer(**adapter.transformer)
    vocabulary, identity = base.settings["vocabulary"], f"{base.identity} {_file_hash(folder / _WEIGHTS)}"
    merge(base.model, adapter.weights, adapter.alpha)
    model.load_state_dict(base.model.state_dict(), assign=True)
    return SequenceModel(
        model=model.eval(),
        template=build_template(adapter.template, Vocabulary(**vocabulary)),
        text=base.text,
        image_tokenizer=base.image_tokenizer,
        settings={"transformer": adapter.transformer, "template": adapter.template, "vocabulary": vocabulary},
        merged_from=identity,
    )


def _file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
