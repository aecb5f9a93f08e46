"""Chooses the form of the model that decodes, and keeps it for further batches.

A form is the model prepared for decoding: compiled for a CPU, with packed weights, with fused kernels, or as it is.
Which one is decided by the options, the model, its device and the compiler of the machine, never by a measurement: a
run that is resumed gets the numbers of one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from weakref import WeakKeyDictionary

import torch

from cogview_pl.errors import UserError
from cogview_pl.generation.config import Engine
from cogview_pl.generation.engine.compiled_cpu import CompiledModel, can_compile
from cogview_pl.generation.engine.fused_gpu import FusedModel, fused_model
from cogview_pl.generation.engine.packed_cpu import PackedModel, can_pack, computes_in_bf16
from cogview_pl.kernels import cpu_decoding
from cogview_pl.transformer.model import Transformer

_Prepared = dict[Hashable, PackedModel | CompiledModel]
_KEPT: WeakKeyDictionary[Transformer, _Prepared] = WeakKeyDictionary()


def keep_forms(model: Transformer) -> None:
    """Prepare each form of the model only once from now on; its weights, device and precision must not change."""
    _KEPT[model] = {}


def engine_of(model: Transformer, engine: Engine) -> Engine:
    """The engine that decodes: `torch` or `compiled`.

    `auto` takes the compiled step where it covers the model and this machine has a C++ compiler, except for bf16 on
    processors that compute in bf16.

    Raises:
        UserError: `compiled` is asked for, and there is no compiler or it does not cover the model.
    """
    if engine == Engine.torch:
        return engine
    if engine == Engine.compiled:
        if not can_compile(model):
            raise UserError(
                "sampler.engine=compiled decodes on a CPU with norm_scope token or none, LayerNorm before each branch, "
                f"fused attention, and sizes of heads that {cpu_decoding.WIDTH} divides; set sampler.engine=torch"
            )
        if cpu_decoding.LIBRARY.missing is not None:
            raise UserError(f"sampler.engine=compiled: {cpu_decoding.LIBRARY.missing}, or set sampler.engine=torch")
        return engine
    return Engine.compiled if wants_compiled(model, engine) and cpu_decoding.LIBRARY.missing is None else Engine.torch


def wants_compiled(model: Transformer, engine: Engine) -> bool:
    """Whether the compiled step decodes the model on a machine with a compiler."""
    return takes_compiled(engine, model.token_embedding.weight.dtype) and can_compile(model)


def takes_compiled(engine: Engine, dtype: torch.dtype) -> bool:
    """Whether the compiled step decodes a model that it covers, on a machine with a compiler."""
    return engine == Engine.compiled or (engine == Engine.auto and not (dtype == torch.bfloat16 and computes_in_bf16()))


def decoding_form(
    model: Transformer, rows: int, ids: Sequence[range], engine: Engine
) -> Transformer | PackedModel | FusedModel | CompiledModel:
    """The form of the model that decodes `rows` rows fastest on its device; `ids` are those that logits are taken of.

    All forms have the methods `hidden` and `logits` of `Transformer`.

    Raises:
        UserError: see `engine_of`.
    """
    prepared = _KEPT.get(model, {})
    key: Hashable
    if engine_of(model, engine) == Engine.compiled:
        key = ("compiled", *ids)
        if key not in prepared:
            prepared[key] = CompiledModel(model, ids)
        return prepared[key]
    if can_pack(model.token_embedding.weight, rows):
        key = (rows, torch.get_num_threads(), *ids)
        if key in prepared:
            return prepared[key]
        prepared.clear()  # one packed copy at a time
        packed = PackedModel(model, rows, ids)
        if not model.sharded:  # a sharded model is part of its form, which would keep it for ever
            prepared[key] = packed
        return packed
    return fused_model(model) or model
