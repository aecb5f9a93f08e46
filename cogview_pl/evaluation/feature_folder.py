"""Model folders of our feature networks: what they were trained on, their sizes and weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cogview_pl.checkpoints.model_folder import FEATURE_NETWORK, find_model_folder, load_model, save_model
from cogview_pl.checkpoints.settings import CONFIG, from_plain, require_types, unfit_named
from cogview_pl.evaluation.caption_network import CaptionNetwork
from cogview_pl.evaluation.style_network import ToyNetwork

_LARGEST = 4096  # largest edge of images in pixels, so that a manipulated file cannot exhaust memory

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedOn:
    """The data that a network learned from."""

    data: str
    """Class of the data set."""
    images: int
    """Number of training images."""
    fingerprint: str
    """Of the training split; see `CaptionedImages.fingerprint`."""


class SavedNetwork(NamedTuple):
    """A network from its folder."""

    network: ToyNetwork | CaptionNetwork
    resolution: int
    """Edge of its training images in pixels."""
    classes: tuple[str, ...] | None
    """Names of its logits, the styles of the toy world; None for a network that learned from captions."""


def save_toy_network(
    network: ToyNetwork, folder: Path, resolution: int, classes: Sequence[str], trained_on: TrainedOn
) -> None:
    """Write the model folder of a network of the toy world; `classes` are the names of its logits."""
    settings = {"resolution": resolution, "classes": list(classes), "toy_network": network.sizes}
    save_model(folder, network, FEATURE_NETWORK, settings | {"trained_on": asdict(trained_on)})


def save_caption_network(
    network: CaptionNetwork, folder: Path, resolution: int, trained_on: TrainedOn, others: tuple[str, ...] = ()
) -> None:
    """Write the model folder of a network that learned from captions; `others` are names of further files in it."""
    sizes = {**network.sizes, "num_terms": network.terms.out_features}
    settings = {"resolution": resolution, "caption_network": sizes, "trained_on": asdict(trained_on)}
    save_model(folder, network, FEATURE_NETWORK, settings, others)


def load_network(path: Path, key: str, *, verify: bool) -> SavedNetwork:
    """The network of a run folder or model folder; a line says what it was trained on.

    Args:
        path: the folder.
        key: configuration key, for errors.
        verify: see `load_model`.

    Raises:
        UserError: the model folder is missing, damaged or of another kind.
    """
    folder = find_model_folder(path, key)
    network, settings = load_model(folder, FEATURE_NETWORK, key, _build, verify=verify)
    with unfit_named(folder / CONFIG):
        _say(f"{key}: {path}, which learned from {_source(settings)}")
    classes = tuple(settings["classes"]) if isinstance(network, ToyNetwork) else None
    return SavedNetwork(network, settings["resolution"], classes)


@cache
def _say(line: str) -> None:
    """Log a line once: a run opens its network for an estimate of memory too."""
    _log.info("%s", line)


def _source(settings: dict[str, Any]) -> str:
    if "trained_on" not in settings:  # of an earlier version, which had the toy world only
        return "the toy world"
    found = from_plain(TrainedOn, settings["trained_on"])
    if not found.data.isprintable():
        raise ValueError(f"trained_on.data is {found.data!r}")
    what = "images of the toy world" if "toy_network" in settings else f"captioned images ({found.data})"
    return f"{found.images:,} {what}"


def _build(settings: dict[str, Any]) -> ToyNetwork | CaptionNetwork:
    """The network of saved settings; raises KeyError, TypeError or ValueError if they are invalid."""
    resolution = settings["resolution"]
    if type(resolution) is not int or not 1 <= resolution <= _LARGEST:
        raise ValueError(f"resolution is {resolution!r}, not a whole number up to {_LARGEST}")
    if "caption_network" in settings:
        return CaptionNetwork(**require_types(CaptionNetwork, settings["caption_network"]))
    classes = settings["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes is {classes!r}, not a list of names")
    return ToyNetwork(**settings["toy_network"], num_styles=len(classes))
