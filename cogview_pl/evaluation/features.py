"""Feature networks: what FID, IS and style accuracy see in a picture. Always a file that the user has.

A file holds a program: TorchScript, or one of `torch.export`. It takes float pictures `(B, 3, Y, X)`, 0 black … 1
white, Y = X = its resolution, and gives features `(B, F)`, or features and logits `(B, K)`. Resolution and class
names may lie in the file, as the extra file `cogview_pl.json`: `{"resolution": …, "classes": […]}`.

TorchScript is read by an unpickler that knows tensors and scripted classes only, and runs in an interpreter of its
own; what is left to refuse are the few operators that reach for files, processes or the network. Loading a program of
`torch.export` runs Python of the file's choice (pickles, SymPy expressions, generated code), so the user must say
that the file is to be trusted.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from cogview_pl.errors import UserError

KEY = "evaluate.features"
RESIZE_FILTER = "bicubic, antialiased"
METADATA = "cogview_pl.json"

_FORBIDDEN_METHODS = (b"__setstate__", b"__forward_hooks__", b"__forward_pre_hooks__")
"""Methods that run when TorchScript is loaded or called, beside the one that is looked at."""

_FORBIDDEN_OPERATORS = frozenset(
    f"{namespace}::{name}"
    for namespace, names in {
        "aten": ("save", "from_file"),
        "prim": ("CallFunction", "CallMethod", "Closure", "awaitable", "fork", "rpc_async", "rpc_remote", "rpc_sync"),
    }.items()
    for name in names
)
"""Operators that touch files, start others, or call what cannot be looked into."""


class Features(NamedTuple):
    """What a network says of pictures."""

    features: Tensor
    """float32 `(B, F)`, on the CPU."""
    logits: Tensor | None
    """float32 `(B, K)`, on the CPU; None where the network has none."""


class FeatureNetwork:
    """A feature network in place, tried on blank pictures.

    Args:
        program: takes float pictures `(B, 3, resolution, resolution)` on `device`.
        resolution: edge of the pictures that it is made for.
        classes: names of the logits, where the file knows them.
        sha256: of the file: the network's identity.
        device: where it runs.
        source: the file, for messages.

    Raises:
        UserError: the program fails on such pictures, or gives something else.
    """

    def __init__(
        self,
        program: Callable[[Tensor], Any],
        *,
        resolution: int,
        classes: tuple[str, ...] | None,
        sha256: str,
        device: str,
        source: Path,
    ) -> None:
        self._program = program
        self.resolution = resolution
        self.classes = classes
        self.sha256 = sha256
        self.device = device
        self.source = source
        for batch in (2, 1):  # some programs are fixed to the batch that they were exported with
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
        """Features of pictures `(B, 3, Y, X)` of any size, float 0 … 1, on any device."""
        size = [self.resolution, self.resolution]
        sized = tv.resize(images.to(self.device), size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return _checked(self._program(sized.clamp(0, 1)), len(images))

    def _try(self, batch: int) -> Features:
        try:
            return self(torch.full((batch, 3, self.resolution, self.resolution), 0.5))
        except Exception as error:  # a foreign program may raise anything
            raise UserError(
                f"{KEY}={self.source} is of no use on a batch of {batch} pictures of {self.resolution} pixels "
                f"({_reason(error)}); it must give features (B, F), or features and logits (B, K)"
            ) from error


def open_features(file: Path, *, device: str, resolution: int | None, trust: bool) -> FeatureNetwork:
    """The network in a file, by its content.

    Args:
        file: TorchScript or a `torch.export` program.
        device: where to run it.
        resolution: edge of its pictures; None takes what the file says.
        trust: whether a `torch.export` program may be opened.

    Raises:
        UserError: the file is missing, no such network, asks for what a network has no need of, does not say its
            resolution, or gives no features.
    """
    if not file.is_file():
        raise UserError(f"{KEY}={file} does not exist; give the file of a feature network, or run task=features")
    names = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
    inside = {name.partition("/")[2] for name in names}
    metadata = _metadata(file, names)
    edge = resolution or metadata.get("resolution")
    if "archive_format" in inside:
        program = _open_exported(file, device, trust)
    elif "constants.pkl" in inside:
        program = _open_torchscript(file, device)
    else:
        what = "weights alone" if "data.pkl" in inside else "no program"
        raise UserError(
            f"{KEY}={file} holds {what}, not TorchScript or a torch.export program; export the network with "
            "torch.jit.trace and torch.jit.save"
        )
    if not isinstance(edge, int) or edge < 1:
        raise UserError(
            f"{KEY}={file} does not say what size of pictures it is made for; set evaluate.resolution "
            "(299 for Inception)"
        )
    classes = metadata.get("classes")
    return FeatureNetwork(
        program,
        resolution=edge,
        classes=None if classes is None else tuple(map(str, classes)),
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        device=device,
        source=file,
    )


def _metadata(file: Path, names: Iterable[str]) -> dict[str, Any]:
    name = next((name for name in names if name.endswith(f"/extra/{METADATA}")), None)
    if name is None:
        return {}
    try:
        found = json.loads(zipfile.ZipFile(file).read(name))
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{KEY}={file} is damaged ({_reason(error)}); make it again") from error
    return found if isinstance(found, dict) else {}


def _open_torchscript(file: Path, device: str) -> Callable[[Tensor], Any]:
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if "/code/" in name and name.endswith(".py"):
                _refuse_methods(archive.read(name), file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated; nothing else loads as safely
            module = torch.jit.load(str(file), map_location=device)
        graph = module.inlined_graph
    except Exception as error:
        raise UserError(f"{KEY}={file} cannot be opened ({_reason(error)}); export it again") from error
    for operator in _operators(graph):
        if operator in _FORBIDDEN_OPERATORS or operator.partition("::")[0] not in ("aten", "prim"):
            raise UserError(f"{KEY}={file} was refused: it calls {operator}, and a feature network has no need to")
    return module.eval()


def _refuse_methods(code: bytes, file: Path) -> None:
    for method in _FORBIDDEN_METHODS:
        if method in code:
            raise UserError(f"{KEY}={file} was refused: it defines {method.decode()}, which runs unasked; trace it")


def _operators(block: Any) -> Iterator[str]:
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from _operators(inner)


def _open_exported(file: Path, device: str, trust: bool) -> Callable[[Tensor], Any]:
    if not trust:
        raise UserError(
            f"{KEY}={file} is a torch.export program, and loading one can run code that is in it; give TorchScript, "
            "or set evaluate.trust_features=true if you know who made the file"
        )
    try:
        with file.open("rb") as stream:
            return torch.export.load(stream).module().to(device)  # type: ignore[arg-type]
    except Exception as error:
        raise UserError(f"{KEY}={file} cannot be opened ({_reason(error)}); export it again") from error


def _checked(found: Any, batch: int) -> Features:
    """Raises ValueError for anything but features, or features and logits."""
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


def _reason(error: BaseException) -> str:
    """The last line of a message, where TorchScript says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:160] if lines else type(error).__name__
