"""Chooses the form of the model that decodes, and keeps it for further batches.

A form is the model prepared for decoding: compiled by OpenVINO, with packed weights, with fused kernels, or as it is.
Which one is decided by the options, the model, its device and the packages of the machine, never by a measurement: a
run that is resumed gets the numbers of one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from weakref import WeakKeyDictionary

import torch

from cogview_pl.errors import UserError
from cogview_pl.generation.config import Engine
from cogview_pl.generation.engine.fused_gpu import FusedModel, fused_model
from cogview_pl.generation.engine.openvino_cpu import OpenVinoModel
from cogview_pl.generation.engine.openvino_graph import can_export
from cogview_pl.generation.engine.packed_cpu import PackedModel, can_pack
from cogview_pl.kernels.openvino import import_openvino, openvino_version
from cogview_pl.transformer.model import Transformer

_SMALLEST = 2_000_000  # weights of the linear maps; smaller models are done before OpenVINO has started

_Prepared = dict[Hashable, PackedModel | OpenVinoModel]
_KEPT: WeakKeyDictionary[Transformer, _Prepared] = WeakKeyDictionary()


def keep_forms(model: Transformer) -> None:
    """Prepare each form of the model only once from now on; its weights, device and precision must not change."""
    _KEPT[model] = {}


def engine_of(model: Transformer, engine: Engine) -> Engine:
    """The engine that decodes: `torch` or `openvino`.

    `auto` takes OpenVINO where it is installed, covers the model, and saves more time than it takes to start: for
    models that are kept (`keep_forms`) and not tiny.

    Raises:
        UserError: `openvino` is asked for, and it is not installed or does not cover the model.
    """
    if engine == Engine.openvino:
        import_openvino()
        if not can_export(model):
            raise UserError(
                "sampler.engine=openvino decodes on a CPU with precision=fp32, norm_scope token or none, and fused "
                "attention; set sampler.engine=torch"
            )
        return engine
    takes = takes_openvino(engine, layers=len(model.blocks), hidden_size=model.token_embedding.weight.shape[1])
    return Engine.openvino if takes and model in _KEPT and can_export(model) else Engine.torch


def takes_openvino(engine: Engine, *, layers: int, hidden_size: int) -> bool:
    """Whether OpenVINO decodes a model of this size that it covers."""
    large = 12 * layers * hidden_size**2 >= _SMALLEST
    return engine == Engine.openvino or (engine == Engine.auto and large and openvino_version() is not None)


def decoding_form(
    model: Transformer, rows: int, ids: Sequence[range], engine: Engine
) -> Transformer | PackedModel | FusedModel | OpenVinoModel:
    """The form of the model that decodes `rows` rows fastest on its device; `ids` are those that logits are taken of.

    All forms have the methods `hidden` and `logits` of `Transformer`.

    Raises:
        UserError: see `engine_of`.
    """
    prepared = _KEPT.get(model, {})
    threads = torch.get_num_threads()
    key: Hashable
    if engine_of(model, engine) == Engine.openvino:
        key = ("openvino", threads, *ids)
        if key not in prepared:
            prepared[key] = OpenVinoModel(model, ids)
        return prepared[key]
    if can_pack(model.token_embedding.weight, rows):
        key = (rows, threads, *ids)
        if key in prepared:
            return prepared[key]
        prepared.clear()  # one packed copy at a time
        packed = PackedModel(model, rows, ids)
        if not model.sharded:  # a sharded model is part of its form, which would keep it for ever
            prepared[key] = packed
        return packed
    return fused_model(model) or model
