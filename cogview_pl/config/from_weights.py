"""Sets keys that follow from the weights that a run starts from or uses, so that nobody types what the files tell."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from cogview_pl.assembly.found_weights import (
    FoundWeights,
    found_weights,
    may_hold_downloads,
    released_base,
    saved_sizes,
    why_no_replay,
)
from cogview_pl.checkpoints.downloads import Downloads, find_downloads, role_of, tokenizers_for, transformer_for
from cogview_pl.checkpoints.released import is_released, is_vqvae_file, vqvae_settings_of
from cogview_pl.config.choices import Verb
from cogview_pl.config.published import PUBLISHED_IMAGE_SIZE, PUBLISHED_VQVAE, is_released_size, weights_missing
from cogview_pl.durable.latest import LATEST, newest, through_latest
from cogview_pl.durable.read import why_unusable
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import predecessor

_TEXT, _IMAGES, _SOURCE = "text.model", "image_tokenizer.path", "convert.source"
_TEMPLATES = {"rerank_with": "rerank_template", "upscale_with": "upscale_template"}
"""Role of a released transformer → layout of its sequences."""
_MADE_BY = {"init_from": "pretrain", "rerank_with": "caption", "upscale_with": "super_resolution"}
_SHOWN = (
    *(f"model.{name}" for name in ("num_layers", "hidden_size", "num_heads", "num_positions", "norm", "dropout")),
    *("image_tokenizer.image_size", "text.max_length", "template.target"),
)
"""Keys that the sentence about changes shows."""


class _Use(NamedTuple):
    """A key that names a model, and the task whose newest run is used if it is null."""

    key: str
    task: str | None = None


class _Place(NamedTuple):
    """Where a model is, and the released weights that it is or, as an adapter, belongs to."""

    key: str
    path: Path
    base: Path | None


def take_from_weights(config: DictConfig, given: Sequence[str]) -> list[str]:
    """Set the keys that follow from the weights of a run.

    A finetune takes sizes, image size and the length of texts from the model that it starts from. Released weights
    also decide tokenizers and layouts, in every task. A folder of downloads stands for the transformer that the key is
    for. Keys that `given` names are not changed.

    Args:
        config: the composed configuration; it is changed.
        given: overrides on the command line.

    Returns:
        Sentences about the changes.

    Raises:
        UserError: there are no weights, a file of them is missing or does not fit, or `given` names another size.
    """
    named = {word.lstrip("+").partition("=")[0] for word in given}
    if config.verb == Verb.tokenize:
        return _of_downloaded_tokenizers(config, named)
    uses = _uses(config)
    places = [place for use in uses if (place := _located(config, use.key, given)) is not None]
    if not uses:
        return []
    starts = config.verb == Verb.fit_sequence_model
    key, task = uses[0]
    if OmegaConf.select(config, key) is not None or task is None:
        released = [place for place in places if starts or place.base is not None]
        return _taken(config, released[0], named, starts=starts) if released else []
    path = newest(Path(config.outputs) / task / LATEST)
    if path is None:
        _require_weights(config, key, task, given)
        return []
    newest_run = _Place(key, path, released_base(path, key))
    # Other tasks go by the model of the folder, so that `model=` may stay on all command lines of a project. But nobody
    # who types the released size means a run of another one.
    asked = is_released_size(config) or (starts and "model" in named)
    if asked and not _is_of_asked_size(config, newest_run, given):
        return []  # of a plan, which goes by `model=`
    if newest_run.base is not None:
        _find_tokenizers(config, newest_run)
    if starts or newest_run.base is not None:
        return _taken(config, newest_run, named, starts=starts)
    return []


def _uses(config: DictConfig) -> list[_Use]:
    """Keys of the models of a task, the main one first."""
    others = [_Use("rerank_with"), _Use("upscale_with")]
    match config.verb:
        case Verb.fit_sequence_model:
            starts = config.init_from is not None or config.starts_from is not None
            return [_Use("init_from", config.starts_from)] if starts else []
        case Verb.generate:
            return [_Use("init_from", "caption" if _describes(config) else "pretrain"), *others]
        case Verb.evaluate:
            return [_Use("init_from"), *others]
        case Verb.magnify:
            return [_Use("upscale_with", "super_resolution")]
        case Verb.rerank:
            return [_Use("rerank_with", "caption")]
        case Verb.convert:
            return [_Use(_SOURCE)]
    return []


def _describes(config: DictConfig) -> bool:
    """Whether task=generate writes captions of images, and does not complete them."""
    completes = config.complete.keep is not None or config.complete.mask is not None
    return config.verb == Verb.generate and config.images is not None and not completes


def _of_downloaded_tokenizers(config: DictConfig, named: set[str]) -> list[str]:
    """Set the keys of task=tokenize that follow from released tokenizers, and from the transformer next to them."""
    value = config.image_tokenizer.path
    path = None if value is None else through_latest(value)
    if path is None or not path.exists():
        return []
    if not may_hold_downloads(path):
        _take_image_size(config, path, named)
        return []
    config.image_tokenizer.path = None
    transformer = transformer_for("init_from", find_downloads(path))
    if transformer is None:
        raise UserError(f"{_IMAGES}={value} holds no released transformer; give the .pt file, or the run of task=vqvae")
    place = _Place(_IMAGES, transformer, transformer)
    _find_tokenizers(config, place, path)
    found = _found(config, place)
    changes = _of_tokenizers(config, found, named)
    if not {"text", "text.max_length"} & named:
        changes["text.max_length"] = found.text_length
    _set(config, changes)
    return [f"{_IMAGES} is {config.image_tokenizer.path}, text.model {config.text.model}"]


def _taken(config: DictConfig, place: _Place, named: set[str], *, starts: bool) -> list[str]:
    """Set the keys that a model decides; returns sentences about them."""
    found = _found(config, place)
    changes = _changes(config, f"{place.key}={place.path}", found, named)
    _set(config, changes)
    if not starts:
        layout = _layout(config, place, named)
        _set(config, layout)
        changes |= layout
    length = _text_length(config, found, named)
    _set(config, length)
    changes |= length
    shown = ", ".join(f"{name}={value}" for name, value in changes.items() if name in _SHOWN)
    sentences = [f"{place.key}={place.path} decides {shown}"] if shown else []
    return sentences + (_drop_replay(config, found, named) if starts else [])


def _set(config: DictConfig, values: dict[str, Any]) -> None:
    for name, value in values.items():
        OmegaConf.update(config, name, value, merge=False)


def _located(config: DictConfig, key: str, given: Sequence[str]) -> _Place | None:
    """The model that a key names; None if it is null or is no transformer. Of released ones, tokenizers are found."""
    value = OmegaConf.select(config, key)
    if value is None:
        return None
    path = through_latest(value)
    if not path.exists():
        if config.plan.only or key not in _MADE_BY:  # a plan goes by `model=`; other keys have messages of their own
            return None
        if is_released_size(config):
            raise weights_missing(config, key, given, f"{key}={value} {why_unusable(path)}")
        predecessor(config.outputs, _MADE_BY[key], key, value)
    folder = path if key in _MADE_BY and may_hold_downloads(path) else None
    if folder is not None:
        path = _in_downloads(config, key, folder, given)
        OmegaConf.update(config, key, str(path))
    if key == _SOURCE and is_released(path) and path.is_file() and is_vqvae_file(path, key, verify=False):
        _take_image_size(config, path, {word.partition("=")[0] for word in given})
        return None
    place = _Place(key, path, released_base(path, key))
    if place.base is not None:
        _find_tokenizers(config, place, folder)
    return place


def _in_downloads(config: DictConfig, key: str, folder: Path, given: Sequence[str]) -> Path:
    """The file or folder among downloads that a key is for."""
    downloads = find_downloads(folder)
    role = "rerank_with" if key == "init_from" and _describes(config) else key
    path = transformer_for(role, downloads)
    if path is not None:
        return path
    if is_released_size(config) or downloads.image_tokenizers or downloads.unreadable:
        reason = f"{key}={folder} holds no folder or file of a transformer{_unreadable(downloads)}"
        raise weights_missing(config, key, given, reason)
    return folder  # whoever opens it says what is missing


def _take_image_size(config: DictConfig, file: Path, named: set[str]) -> None:
    """Set the image size of the published image tokenizer, which its file does not contain."""
    if {"image_tokenizer", "image_tokenizer.image_size"} & named or not (is_released(file) and file.is_file()):
        return
    found = vqvae_settings_of(file)
    if tuple(found[name] for name in ("hidden_size", "codebook_dim", "codebook_size")) == PUBLISHED_VQVAE:
        config.image_tokenizer.image_size = PUBLISHED_IMAGE_SIZE


def _find_tokenizers(config: DictConfig, place: _Place, folder: Path | None = None) -> None:
    """Set `text.model` and `image_tokenizer.path` to the files that belong to released weights.

    They are looked for in the folder of downloads; where that is not known, in the folder that the transformer lies in.
    """
    assert place.base is not None
    base = place.base.absolute()
    folder = base.parent if folder is None else folder
    given = [None if value is None else Path(value) for value in (config.text.model, config.image_tokenizer.path)]
    if None not in given:
        return
    text, images = tokenizers_for(base, place.key, folder, text=given[0], images=given[1])
    for name, what, file in (
        (_TEXT, "the text tokenizer cog-pretrain.model", text),
        (_IMAGES, "an image tokenizer, a .pt file,", images),
    ):
        if file is None:
            raise UserError(
                f"{place.key}={place.path} was published with {what} which is not in {folder}"
                f"{_unreadable(find_downloads(folder))}; put it there, or set {name} to it"
            )
        OmegaConf.update(config, name, str(file))


def _unreadable(downloads: Downloads) -> str:
    return f" ({downloads.unreadable[0]})" if downloads.unreadable else ""


def _require_weights(config: DictConfig, key: str, task: str, given: Sequence[str]) -> None:
    """Raises UserError because there are no weights. A plan needs none; other tasks have messages of their own."""
    if config.plan.only:
        return
    if is_released_size(config):
        reason = f"{key} is null and {Path(config.outputs) / task} has no finished run"
        raise weights_missing(config, key, given, reason)
    if config.verb == Verb.fit_sequence_model:
        predecessor(config.outputs, task, key, None)


def _is_of_asked_size(config: DictConfig, place: _Place, given: Sequence[str]) -> bool:
    """Whether the newest run has the size of `model=`; raises UserError if it has not and this is no plan."""
    sizes = saved_sizes(place.path, place.key, verify=bool(config.verify))
    layers, size = sizes["num_layers"], sizes["hidden_size"]
    if (layers, size) == (config.model.num_layers, config.model.hidden_size):
        return True
    if config.plan.only:
        return False
    is_a = f"{place.key} is null, and the newest run, {place.path}, has {layers} layers of size {size}"
    if is_released_size(config):
        raise weights_missing(config, place.key, given, is_a)
    raise UserError(
        f"model: {is_a}, this run {config.model.num_layers} of {config.model.hidden_size}; leave model out, or set "
        f"{place.key} to a model of this size"
    )


def _found(config: DictConfig, place: _Place) -> FoundWeights:
    return found_weights(
        place.path,
        place.key,
        text=config.text.model,
        images=config.image_tokenizer.path,
        verify=bool(config.verify),
    )


def _changes(config: DictConfig, source: str, found: FoundWeights, named: set[str]) -> dict[str, Any]:
    """Keys with other values than the files have → values of the files.

    Raises:
        UserError: the command line names another size of the model, or the files do not tell the number of heads.
    """
    sizes = {name: value for name, value in found.model.items() if name != "dropout"}
    other = {name: value for name, value in sizes.items() if _plain(config.model[name]) != value}
    for name, value in other.items():
        if "model" in named or f"model.{name}" in named:
            raise UserError(
                f"{source} has {name}={value}, this run model.{name}={_plain(config.model[name])}; leave it out, "
                "since the weights decide it, or give other weights"
            )
    if "num_heads" not in sizes and other and not {"model", "model.num_heads"} & named:
        raise UserError(
            f"{source} has {sizes['num_layers']} layers of size {sizes['hidden_size']}, and the files do not tell the "
            "number of heads; set model.num_heads"
        )
    changes: dict[str, Any] = {f"model.{name}": value for name, value in other.items()}
    dropout = found.model.get("dropout", config.model.dropout)
    if other and "model.dropout" not in named and dropout != config.model.dropout:
        changes["model.dropout"] = dropout
    return changes | _of_tokenizers(config, found, named)


def _of_tokenizers(config: DictConfig, found: FoundWeights, named: set[str]) -> dict[str, Any]:
    """Keys of the image tokenizer and of the text tokenizer with other values than the files have."""
    return {
        key: value
        for key, value in found.tokenizers.items()
        if key not in named and OmegaConf.select(config, key) != value
    }


def _layout(config: DictConfig, place: _Place, named: set[str]) -> dict[str, Any]:
    """The layout of released weights whose name tells that they are no generator."""
    template = _TEMPLATES.get(role_of(place.path) or "")
    if place.key not in ("init_from", _SOURCE) or template is None or "template" in named:
        return {}
    return {f"template.{name}": _plain(value) for name, value in config[template].items()}


def _text_length(config: DictConfig, found: FoundWeights, named: set[str]) -> dict[str, Any]:
    """`text.max_length` of the weights, or less where a layout needs more positions."""
    if {"text", "text.max_length"} & named:
        return {}
    names = ("layout", "target", "loss", "restart_positions_at")
    length = found.fitting_text_length({name: _plain(config.template[name]) for name in names})
    return {} if length < 1 or length == config.text.max_length else {"text.max_length": length}


def _drop_replay(config: DictConfig, found: FoundWeights, named: set[str]) -> list[str]:
    """Set `sequences.replay_share` to 0 where no token store is named and the newest one does not fit; says so."""
    sequences = config.sequences
    if not sequences.replay_share or sequences.replay_store is not None or "sequences.replay_share" in named:
        return []
    why = why_no_replay(newest(Path(config.outputs) / "tokenize" / LATEST), found)
    if why is None:
        return []
    share, sequences.replay_share = sequences.replay_share, 0.0
    return [
        f"sequences.replay_share={share:g} becomes 0, because {why}: nothing is mixed in against forgetting; "
        "sequences.replay_store names a token store to mix in"
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, DictConfig):
        return OmegaConf.to_container(value, resolve=True)
    return value.value if isinstance(value, Enum) else value
