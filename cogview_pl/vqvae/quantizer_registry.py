"""Quantizers by the dotted names of their classes; nothing here imports a module by its name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from cogview_pl.errors import UserError
from cogview_pl.vqvae import projected_quantizers as _projected  # noqa: F401 (its classes count as imported)
from cogview_pl.vqvae import quantizer as _built_in  # noqa: F401 (likewise)
from cogview_pl.vqvae.config import BUILT_IN, QUANTIZERS
from cogview_pl.vqvae.quantizer_base import Quantizer


def build_quantizer(options: Mapping[str, Any], *, codebook_size: int, codebook_dim: int) -> Quantizer:
    """A quantizer from its options: `_target_`, the dotted name of its class, and the arguments of the class.

    Raises:
        UserError: see `quantizer_class`; or the class takes other arguments.
    """
    arguments = {"codebook_size": codebook_size, "codebook_dim": codebook_dim, **options}
    kind = quantizer_class(str(arguments.pop("_target_", None)))
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise UserError(f"image_tokenizer.quantizer: {kind.__name__}: {error}; correct its arguments") from error
    return kind(**arguments)


def quantizer_class(target: str) -> type[Quantizer]:
    """The subclass of `Quantizer` with a dotted name, among all that are imported.

    It imports nothing, so a downloaded model folder cannot run code by the name of a class.

    Raises:
        UserError: there is none.
    """
    known = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _subclasses(Quantizer)}
    if target not in known:
        raise UserError(
            f"image_tokenizer.quantizer._target_={target[:100]} is no imported subclass of {BUILT_IN}.Quantizer; name "
            f"the module that defines the class, or choose image_tokenizer/quantizer={QUANTIZERS}"
        )
    return known[target]


def _subclasses(base: Any) -> Iterator[type[Quantizer]]:
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind):
            yield kind
        yield from _subclasses(kind)
