"""Feature networks for FID, IS and style accuracy.

The user gives a run of task=features, the weights of a known network (Inception v3), or a file that holds a program.
A program is opened only if the user trusts it, because opening it runs code of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from cogview_pl.checkpoints.safe_pickle.load import is_file
from cogview_pl.durable.read import why_unusable
from cogview_pl.errors import UserError
from cogview_pl.evaluation import inception
from cogview_pl.evaluation.feature_folder import load_network
from cogview_pl.evaluation.protocol import digest_of_weights
from cogview_pl.evaluation.state_dicts import holds_more_than_weights, read_state_dict, sha256_of
from cogview_pl.evaluation.torchscript import open_program, reason_of

KEY = "evaluate.features"
RESIZE_FILTER = "bicubic, antialiased"


class Features(NamedTuple):
    """Output of a feature network."""

    features: Tensor
    """float32 `(B, F)`, on the CPU."""
    logits: Tensor | None
    """float32 `(B, K)`, on the CPU; None if the network has no logits."""


class FeatureNetwork:
    """A feature network on its device. The constructor runs it on blank images once.

    Args:
        run: maps float images `(B, 3, resolution, resolution)` on `device`, 0 black … 1 white, to features `(B, F)`,
            or to features and logits `(B, K)`.
        resolution: edge of its input images in pixels.
        classes: names of the logits; None if they are unknown.
        sha256: hash of its file or of its weights, as identity of the network.
        device: device of the network.
        source: file or folder, for messages.

    Raises:
        UserError: the network fails on blank images, or returns anything else.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Any],
        *,
        resolution: int,
        classes: tuple[str, ...] | None,
        sha256: str,
        device: str,
        source: Path,
    ) -> None:
        self._run = run
        self.resolution = resolution
        self.classes = classes
        self.sha256 = sha256
        self.device = device
        self.source = source
        for batch in (2, 1):  # some exported programs accept one batch size only
            found = self._try(batch)
        self.num_features = found.features.shape[1]
        self.num_classes = None if found.logits is None else found.logits.shape[1]
        if classes is not None and self.num_classes != len(classes):
            raise UserError(
                f"{KEY}={source} names {len(classes)} classes and gives {self.num_classes or 'no'} logits; "
                "export it again"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of images `(B, 3, Y, X)` of any size, float 0 … 1, on any device."""
        size = [self.resolution, self.resolution]
        sized = tv.resize(images.to(self.device), size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return _checked(self._run(sized.clamp(0, 1)), len(images))

    def _try(self, batch: int) -> Features:
        try:
            return self(torch.full((batch, 3, self.resolution, self.resolution), 0.5))
        except Exception as error:  # a foreign program may raise anything
            raise UserError(
                f"{KEY}={self.source} fails on a batch of {batch} images of {self.resolution} pixels "
                f"({reason_of(error)}); it must give features (B, F), or features and logits (B, K)"
            ) from error


def open_features(path: Path, *, device: str, resolution: int | None, trust: bool, verify: bool) -> FeatureNetwork:
    """The network in a folder or file; the content decides its kind.

    Args:
        path: run folder or model folder of task=features, a state dict of Inception v3 (torchvision's or FID's), or a
            program (TorchScript or torch.export).
        device: device of the network.
        resolution: edge of its input images in pixels; None: the resolution of the network.
        trust: whether a program may be opened, which runs code of the file.
        verify: compare files with their checksums, and refuse weights that are not finite.

    Raises:
        UserError: the file is missing, damaged or no such network; it is a program without trust; it does not state
            its resolution; it gives no features.
    """
    if path.is_dir():
        network, edge, classes = load_network(path, KEY, verify=verify)
        network.to(device)
        # Several terms belong to an image, so their logits are none of classes, which IS and style accuracy need.
        run = network if classes is not None else lambda images: network(images)[0]
        return FeatureNetwork(
            run,
            resolution=resolution or edge,
            classes=classes,
            sha256=digest_of_weights(network),
            device=device,
            source=path,
        )
    if not is_file(path):
        raise UserError(f"{KEY}={path} {why_unusable(path)}; give the file of a feature network, or run task=features")
    if holds_more_than_weights(path, KEY):
        return _open_program(path, device, resolution, trust)
    return FeatureNetwork(
        inception.open_inception(read_state_dict(path, KEY, verify=verify), path, KEY).to(device),
        resolution=resolution or inception.RESOLUTION,
        classes=None,
        sha256=sha256_of(path),
        device=device,
        source=path,
    )


def _open_program(file: Path, device: str, resolution: int | None, trust: bool) -> FeatureNetwork:
    if not trust:
        raise UserError(
            f"{KEY}={file} holds more than weights, and opening a program (TorchScript, torch.export) runs code from "
            "its file; give weights alone, or set evaluate.trust_features=true if you trust whoever made it"
        )
    program = open_program(file, KEY, device)
    edge = resolution or program.metadata.get("resolution")
    if not isinstance(edge, int) or edge < 1:
        raise UserError(
            f"{KEY}={file} does not state the resolution of its images; set evaluate.resolution (299 for Inception)"
        )
    classes = program.metadata.get("classes")
    return FeatureNetwork(
        program.run,
        resolution=edge,
        classes=tuple(map(str, classes)) if isinstance(classes, Iterable) else None,
        sha256=sha256_of(file),
        device=device,
        source=file,
    )


def _checked(found: Any, batch: int) -> Features:
    """Features from the output of a network; raises ValueError for any other output."""
    outputs = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    if not 1 <= len(outputs) <= 2 or not all(isinstance(output, Tensor) for output in outputs):
        raise ValueError(f"it gives {type(found).__name__} of {len(outputs)}")
    for output in outputs:
        if output.dim() != 2 or len(output) != batch or not output.is_floating_point():
            raise ValueError(f"it gives {output.dtype} {tuple(output.shape)}")
        if not output.isfinite().all():
            raise ValueError("it gives numbers that are not finite")
    features, *logits = (output.float().cpu() for output in outputs)
    return Features(features, logits[0] if logits else None)
