"""Stage 2: the transformer over text and image tokens."""

from cogview_pl.transformer.block import Cache
from cogview_pl.transformer.cache import KVCache, StaticKVCache
from cogview_pl.transformer.fused import fused_model
from cogview_pl.transformer.loss import SequenceLoss, over_devices, sequence_loss
from cogview_pl.transformer.model import Transformer
from cogview_pl.transformer.packed import DecodingModel

__all__ = [
    "Cache",
    "DecodingModel",
    "KVCache",
    "SequenceLoss",
    "StaticKVCache",
    "Transformer",
    "fused_model",
    "over_devices",
    "sequence_loss",
]
