"""Checkpoints of training (`.ckpt`) as models: they hold what a model folder holds, and can be moved like one.

Lightning's dictionary has an entry `cogview_pl` with, under `model`:

    config            values of the `config.yaml` of a model folder, with its `kind`
    text              sequence model only: the SentencePiece file, uint8
    image_tokenizer   sequence model only: `config` and `weights` of the image tokenizer
    adapter           LoRA only, instead of the tokenizers: values of the adapter's `config.yaml`, path of its base

They are read by `safe_pickle`, so that reading a checkpoint from anywhere runs no code of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
import xxhash
from torch import Tensor

from cogview_pl.checkpoints.model_folder import (
    IMAGE_TOKENIZER,
    SEQUENCE_MODEL,
    ImageTokenizer,
    SequenceModel,
    build_empty,
    build_tokenizer,
    build_transformer,
    image_tokenizer_config,
    image_tokenizer_of,
    require_kind,
    require_quantizer,
    sequence_model_config,
    sequence_model_of,
)
from cogview_pl.checkpoints.safe_pickle.load import read_pt
from cogview_pl.checkpoints.settings import CONFIG, Settings, plain, unfit_named
from cogview_pl.checkpoints.weights import assign_weights, require_finite
from cogview_pl.durable.latest import through_latest
from cogview_pl.durable.read import why_unusable
from cogview_pl.errors import UserError
from cogview_pl.vocab import TextTokenizer, Vocabulary

ENTRY = "cogview_pl"
"""Key of the project's entries in Lightning's checkpoints."""
AVERAGES = "averaged_weights"
"""Key of the moving averages of the weights, by their names in `state_dict`."""

_SUFFIX = ".ckpt"
_LAST = Path("checkpoints", "last.ckpt")
_MODULE = "model."  # the model in the LightningModule
_DESCRIBED_BY = "entry cogview_pl"

_MOST_LAYERS = 1000  # of the base of an adapter; the largest model has 48

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingCheckpoint:
    """What a checkpoint holds of a model."""

    file: Path
    step: int
    """Steps of the optimizer that the weights have had."""
    parts: Mapping[str, Any]
    """`model` of the project's entry."""
    weights: dict[str, Tensor]
    """Weights of the model, or those that were trained with LoRA; averages where the run had them."""

    @property
    def config(self) -> dict[str, Any]:
        """Values of the `config.yaml` of a model folder."""
        return dict(self.parts["config"])


def image_tokenizer_parts(settings: Settings) -> dict[str, Any]:
    """What checkpoints keep of an image tokenizer with the given `ImageTokenizer.settings`."""
    return {"config": plain({"kind": IMAGE_TOKENIZER, **image_tokenizer_config(settings)})}


def sequence_model_parts(
    transformer: Settings,
    template: Settings,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    image_tokenizer: ImageTokenizer,
) -> dict[str, Any]:
    """What checkpoints keep of a sequence model besides its weights."""
    weights = {name: tensor.detach().cpu() for name, tensor in image_tokenizer.model.state_dict().items()}
    return {
        "config": plain({"kind": SEQUENCE_MODEL, **sequence_model_config(transformer, template, vocabulary)}),
        "text": torch.frombuffer(bytearray(text.serialized), dtype=torch.uint8),
        "image_tokenizer": {**image_tokenizer_parts(image_tokenizer.settings), "weights": weights},
    }


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint at a path: the path itself, or `last.ckpt` of a run folder without a finished model; else None."""
    path = through_latest(path)
    if path.suffix == _SUFFIX:
        return path
    finished = (path / "weights.safetensors", path / "adapter.safetensors", path / "model" / CONFIG)
    if any(file.exists() for file in (*finished, path / "adapter" / CONFIG)) or not (path / _LAST).exists():
        return None
    return path / _LAST


def read_checkpoint(path: str | Path, key: str, kind: str | None, *, verify: bool) -> TrainingCheckpoint:
    """The model in a checkpoint.

    Args:
        path: a path for which `find_checkpoint` finds one.
        key: config key that error messages name.
        kind: required kind of the model; None: any.
        verify: compare checksums, and refuse weights that are not finite.

    Raises:
        UserError: it is missing, damaged, of another program, or of another kind.
    """
    file = find_checkpoint(path)
    assert file is not None
    if not file.is_file():
        reason = "is a folder, as checkpoints of DeepSpeed are" if file.is_dir() else why_unusable(file)
        raise UserError(f"{key}={file} {reason}; give a .ckpt file, or the folder of a finished run")
    found = read_pt(file, key, verify=verify)
    ours = found.get(ENTRY)
    if not isinstance(ours, dict):
        raise UserError(f"{key}={file} is no checkpoint of this program; give a run folder, or a .ckpt in it")
    if not isinstance(ours.get("model"), dict):
        raise UserError(
            f"{key}={file} was saved by an earlier version, without the tokenizers; give the model/ of its run"
        )
    with unfit_named(file, "file"):
        checkpoint = TrainingCheckpoint(file, int(found["global_step"]), ours["model"], _weights(found))
        config = checkpoint.config
    if kind is not None:
        require_kind(config, kind, file, key)
    _check_settings(checkpoint, key)
    if verify:
        require_finite(checkpoint.weights, file)
    return checkpoint


def announce(checkpoint: TrainingCheckpoint, path: str | Path, key: str) -> None:
    """Log that a run which has not ended gives its newest checkpoint, if `path` is the folder of such a run."""
    if Path(path).suffix != _SUFFIX:
        _log.warning(
            "%s=%s: the run has not ended, so its checkpoints/%s of step %d is used",
            *(key, path, checkpoint.file.name, checkpoint.step),
        )


def image_tokenizer_in(path: str | Path, key: str, *, verify: bool = True) -> ImageTokenizer:
    """The image tokenizer in a checkpoint; raises UserError as `read_checkpoint` does."""
    checkpoint = read_checkpoint(path, key, IMAGE_TOKENIZER, verify=verify)
    announce(checkpoint, path, key)
    return _image_tokenizer(checkpoint.config, checkpoint.weights, checkpoint.file, key)


def sequence_model_in(path: str | Path, key: str, *, verify: bool = True) -> SequenceModel:
    """The sequence model in a checkpoint without an adapter; raises UserError as `read_checkpoint` does."""
    checkpoint = read_checkpoint(path, key, SEQUENCE_MODEL, verify=verify)
    announce(checkpoint, path, key)
    file, config = checkpoint.file, checkpoint.config
    with unfit_named(file, "file"):
        model = build_empty(config, len(checkpoint.weights), lambda config: build_transformer(config["transformer"]))
        inner = checkpoint.parts["image_tokenizer"]
        images = _image_tokenizer(dict(inner["config"]), inner["weights"], file, key)
    assign_weights(model, checkpoint.weights, file, _DESCRIBED_BY)
    return sequence_model_of(model, config, text_in(checkpoint), images, named=f"{key}={file}", file=file)


def text_in(checkpoint: TrainingCheckpoint) -> TextTokenizer:
    """The text tokenizer in a checkpoint of a sequence model."""
    with unfit_named(checkpoint.file, "file"):
        return TextTokenizer(checkpoint.parts["text"].numpy().tobytes())


def checkpoint_hash(file: Path) -> str:
    """Hash of the names, sizes and checksums of all records in a checkpoint; it does not read the records."""
    digest = xxhash.xxh3_128()
    try:
        with ZipFile(file) as archive:
            for record in archive.infolist():
                digest.update(f"{record.filename} {record.file_size} {record.CRC} ".encode())
    except (OSError, BadZipFile) as error:
        raise UserError(f"{file} cannot be read ({error}); give another checkpoint") from error
    return digest.hexdigest()


def _check_settings(checkpoint: TrainingCheckpoint, key: str) -> None:
    """Raises UserError for settings from which no model can be built; a checkpoint has no manifest of them."""
    file, config, tensors = checkpoint.file, checkpoint.config, len(checkpoint.weights)
    if config["kind"] == IMAGE_TOKENIZER:
        require_quantizer(config, file, key, _DESCRIBED_BY)
    with unfit_named(file, "file"):
        if config["kind"] == IMAGE_TOKENIZER:
            build_empty(config, tensors, lambda config: build_tokenizer(config["vqvae"]))
        else:  # an adapter may have fewer tensors than the model has layers
            tensors = _MOST_LAYERS if "adapter" in checkpoint.parts else tensors
            build_empty(config, tensors, lambda config: build_transformer(config["transformer"]))


def _image_tokenizer(config: dict[str, Any], weights: Mapping[str, Tensor], file: Path, key: str) -> ImageTokenizer:
    require_quantizer(config, file, key, _DESCRIBED_BY)
    with unfit_named(file, "file"):
        model = build_empty(config, len(weights), lambda config: build_tokenizer(config["vqvae"]))
    assign_weights(model, weights, file, _DESCRIBED_BY)
    with unfit_named(file, "file"):
        return image_tokenizer_of(model, config)


def _weights(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Weights of the model in Lightning's dictionary; raises ValueError if they are none."""
    state = found["state_dict"]
    averages = {name: value.to(state[name].dtype) for name, value in found.get(AVERAGES, {}).items()}
    weights = {
        str(name).removeprefix(_MODULE): value
        for name, value in {**state, **averages}.items()
        if str(name).startswith(_MODULE)
    }
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError("its state_dict holds no weights of a model")
    return weights
