"""Image tokenizers of other projects, behind the methods of `VQVAE` that the tasks after stage 1 use.

Shapes: B images, Y X image edges, y x = Y, X / downsampling, K codebook_size.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cogview_pl.errors import UserError
from cogview_pl.vqvae.config import EXTERNAL_KEY as _KEY
from cogview_pl.vqvae.model import VQVAE

EXTERNAL = "external"
"""Setting of a model folder that holds the class and its arguments."""
_PROTOCOL = "encode(images), decode(codes), and whole numbers codebook_size and downsampling"

_trusted: dict[str, type[nn.Module]] = {}


class ExternalTokenizer(nn.Module):
    """An image tokenizer by a protocol. The wrapped module has

    - `encode(images)`: float `(B, 3, Y, X)`, 0 black .. 1 white -> integer codes `(B, y, x)` in `[0, K)`,
    - `decode(codes)`: int64 `(B, y, x)` -> float `(B, 3, Y, X)` on the scale 0..1, not necessarily clipped,
    - `codebook_size`: K, and `downsampling`: pixels along an edge per code.

    Args:
        tokenizer: the module.
        target: dotted name of its class, for messages.

    Raises:
        UserError: it lacks a part of the protocol, or has no weights, which tell its device.
    """

    def __init__(self, tokenizer: nn.Module, target: str) -> None:
        super().__init__()
        self._name = f"{_KEY}._target_={target}"
        for method in ("encode", "decode"):
            if not callable(getattr(tokenizer, method, None)):
                raise UserError(f"{self._name} has no method {method}; the class needs {_PROTOCOL}")
        for number in ("codebook_size", "downsampling"):
            found = getattr(tokenizer, number, None)
            if not isinstance(found, int) or found < 1:
                raise UserError(f"{self._name} has {number}={found!r}; the class needs {_PROTOCOL}")
        if next(tokenizer.parameters(), None) is None:
            raise UserError(f"{self._name} has no parameters; register its weights in the module")
        self.tokenizer: Any = tokenizer
        self.codebook_size: int = int(tokenizer.codebook_size)  # type: ignore[arg-type]
        self.downsampling: int = int(tokenizer.downsampling)  # type: ignore[arg-type]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes of images, int64; raises UserError for a type, shape or range that the protocol excludes."""
        codes = self.tokenizer.encode(images)
        wanted = (len(images), *(edge // self.downsampling for edge in images.shape[-2:]))
        fits = isinstance(codes, Tensor) and not (codes.is_floating_point() or codes.is_complex())
        self._require(fits and tuple(codes.shape) == wanted, "encode", images, codes, f"whole numbers {wanted}")
        lowest, highest = (int(value) for value in codes.aminmax())
        if lowest < 0 or highest >= self.codebook_size:
            raise UserError(
                f"{self._name}: encode gives codes from {lowest} to {highest}, codebook_size={self.codebook_size} "
                f"allows 0 to {self.codebook_size - 1}; correct the class"
            )
        return codes.long()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes; raises UserError for a type or shape that the protocol excludes."""
        images = self.tokenizer.decode(codes)
        wanted = (len(codes), 3, *(edge * self.downsampling for edge in codes.shape[-2:]))
        fits = isinstance(images, Tensor) and images.is_floating_point()
        self._require(fits and tuple(images.shape) == wanted, "decode", codes, images, f"floats {wanted}")
        return images

    def _require(self, fits: bool, method: str, given: Tensor, found: Any, wanted: str) -> None:
        if not fits:
            shown = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"{self._name}: {method} gives {shown} for {tuple(given.shape)}, needed are {wanted} "
                f"(downsampling={self.downsampling}); correct the class"
            )


AnyTokenizer = VQVAE | ExternalTokenizer
"""What encodes and decodes images."""


def trust_external(target: str) -> None:
    """Import the class of an external tokenizer, so that a configuration and model folders may name it.

    Raises:
        UserError: there is no such subclass of `torch.nn.Module`.
    """
    module, _, name = target.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{_KEY}._target_={target}: {error}; give module.Class of a file in the working folder or of an installed "
            "package"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"{_KEY}._target_={target} is no subclass of torch.nn.Module; give your class")
    _trusted[target] = kind


def is_trusted(target: str) -> bool:
    """Whether this process named the class by `trust_external`."""
    return target in _trusted


def build_external(settings: Mapping[str, Any]) -> ExternalTokenizer:
    """An external tokenizer from its settings: `external`, the class (`_target_`) with its arguments.

    Raises:
        UserError: the class is not trusted, takes other arguments, or lacks a part of the protocol.
    """
    arguments = dict(settings[EXTERNAL])
    target = str(arguments.pop("_target_", None))
    if not is_trusted(target):
        raise UserError(f"{_KEY}._target_={target[:100]} was not named by the configuration; name it if you trust it")
    try:
        inspect.signature(_trusted[target]).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{_KEY}: {_trusted[target].__name__}: {error}; correct its arguments") from error
    with torch.device("cpu"):  # a class that loads its own weights would lose them on the meta device
        return ExternalTokenizer(_trusted[target](**arguments), target)


def external_settings(model: ExternalTokenizer, node: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an external tokenizer in a model folder; `node` is its class with the arguments."""
    return {EXTERNAL: dict(node), "codebook_size": model.codebook_size, "downsampling": model.downsampling}
