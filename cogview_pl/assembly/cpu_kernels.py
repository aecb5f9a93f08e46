"""Chooses the kernels that train a sequence model on a CPU, and prepares them."""

from __future__ import annotations

import logging

from cogview_pl.assembly.devices import device_type
from cogview_pl.assembly.options import TrainingOptions
from cogview_pl.errors import UserError
from cogview_pl.kernels import cpu_training
from cogview_pl.kernels.config import CPUKernels
from cogview_pl.kernels.cpp_library import Library, NoLibraryError
from cogview_pl.lit.bars import status
from cogview_pl.runs.ranks import RANKS

SETTING = "cpu_kernels"
"""Key of the kernels in the record of a run: a resumed run must have the same, because the others round differently."""

_log = logging.getLogger(__name__)


def training_kernels(choice: CPUKernels, options: TrainingOptions) -> CPUKernels | None:
    """The kernels of a run: `compiled`, ready for use, or `torch`; None: a run for which there is no choice.

    Raises:
        UserError: the choice is `compiled`, and this run or this machine cannot use them.
    """
    unfit = _unfit(options)
    if unfit is not None:
        if choice == CPUKernels.compiled:
            raise UserError(f"cpu_kernels=compiled: {unfit}, or use cpu_kernels=auto")
        return None
    if choice == CPUKernels.torch:
        return choice
    try:
        prepare(cpu_training.LIBRARY, "training")
    except NoLibraryError as error:
        if choice == CPUKernels.compiled:
            raise UserError(f"cpu_kernels=compiled: {error}, or use cpu_kernels=auto") from error
        if RANKS.first:
            _log.info("Training uses the kernels of torch, up to a third slower: %s.", error)
        return CPUKernels.torch
    return CPUKernels.compiled


def prepare(library: Library, purpose: str) -> None:
    """Compile a library, unless that was done before, and say so; raises NoLibraryError if this machine cannot."""
    if RANKS.first and not library.is_compiled():
        status(f"compiling the {purpose} kernels …")
    library.load()


def _unfit(options: TrainingOptions) -> str | None:
    """The property of a run that excludes these kernels."""
    if device_type(options.trainer["accelerator"]) != "cpu":
        return "they are for a CPU; set trainer.accelerator=cpu"
    if options.precision.get("precision") != "32-true":
        return "they compute in fp32; set precision=fp32"
    if options.strategy.kind.sharded:
        return f"strategy={options.strategy.kind.value} shards the weights; set strategy=single"
    if options.compile:
        return "torch.compile makes its own kernels; set compile=false"
    return None
