"""Memory of inference, by arithmetic: weights, KV cache, packed weights, activations of the widest layer, logits.

Shapes: B rows, L tokens, D hidden size, S cached positions, n ids that a token is sampled from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cogview_pl.generation.engine.packed_cpu import packed_bytes
from cogview_pl.generation.quantization import matrix_bytes
from cogview_pl.memory.phases import ACTIVATIONS, LOGITS
from cogview_pl.vocab import Template
from cogview_pl.vqvae.codebook import BLOCK_VALUES

_FP32 = torch.float32.itemsize
_MLP = 12  # (B, L, D) tensors at the peak of a block: 8 before and after GELU; the others are its input and norms
_ATTENTION = 7  # (B, L, D) tensors besides the scores of explicit attention
_SAMPLING, _TOP_P = 20, 25  # bytes besides each logit: probabilities in fp32, their sums in fp64; what top-p sorts
_SEARCH = 2 * BLOCK_VALUES * _FP32  # two blocks of distances between vectors and codes


@dataclass(frozen=True)
class ModelSize:
    """A sequence model on one device.

    Attributes:
        parameters: number of all parameters.
        layers, hidden_size, num_heads: of the full model.
        dtype: of the weights.
        explicit_attention: attention scores exist as a tensor (`attention=pb_relax` or `naive`).
        keeps_inputs: decoding keeps the input of every layer instead of keys and values (`norm_scope=tensor`).
        parts: devices among which tensor parallelism divides the blocks.
        quantization: `int8`, `int4` or None.
        on_gpu: whether the device is a GPU.
    """

    parameters: int
    layers: int
    hidden_size: int
    num_heads: int
    dtype: torch.dtype
    explicit_attention: bool = False
    keeps_inputs: bool = False
    parts: int = 1
    quantization: str | None = None
    on_gpu: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the weights."""
        divided = self.layers * (12 * self.hidden_size**2 + 7 * self.hidden_size)  # matrices, biases of qkv and up
        size = (self.parameters - divided + divided // self.parts) * self.dtype.itemsize
        if self.quantization is None:
            return size
        matrices = 12 * self.hidden_size**2 * self.dtype.itemsize
        return size - int(self.layers * (matrices - matrix_bytes(self.quantization, self.hidden_size)))

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the weights when they are read: fp32."""
        return self.parameters * _FP32

    def decode(
        self, template: Template, *, rows: int, drafts: int = 0, sorts: bool = False, more_positions: int = 0
    ) -> Counter[str]:
        """Bytes besides the weights while the target slot is sampled, token by token, after the longest prompt.

        Args:
            template: the layout.
            rows: B; guidance takes two rows per image.
            drafts: codes that Jacobi decoding looks ahead.
            sorts: whether top-p sorts the probabilities.
            more_positions: what the cache holds besides one sequence.
        """
        prompt = len(template.prompt({slot.name: [0] * slot.length for slot in template.slots}))
        ids = sum(map(len, template.allowed(template.target)))
        looks_ahead = 2 * (drafts + 1) if drafts else 0
        positions = prompt + template.target.length + looks_ahead + more_positions
        numbers = self.layers * self.hidden_size * positions * rows
        cached = self.dtype.itemsize if self.on_gpu else _FP32
        cache = numbers * self.dtype.itemsize if self.keeps_inputs else 2 * numbers * cached // self.parts
        packed = 0
        if not self.on_gpu:
            quantized = self.quantization is not None or self.parts > 1
            packed = packed_bytes(
                layers=self.layers, hidden_size=self.hidden_size, ids=ids, dtype=self.dtype, quantized=quantized
            )
        sampling = rows * (drafts + 1) * ids * (self.dtype.itemsize + (_TOP_P if sorts else _SAMPLING))
        reading = self._forward(rows, prompt)
        step = {ACTIVATIONS: reading} if reading > sampling else {LOGITS: sampling}
        return Counter({"kv_cache": cache, "packed_weights": packed, **step})

    def score(self, *, rows: int, tokens: int, scored: int, ids: int) -> Counter[str]:
        """Bytes besides the weights while a captioner reads `rows` pairs and scores `scored` tokens of each."""
        hidden = rows * tokens * self.hidden_size * self.dtype.itemsize
        logits = rows * scored * (ids * (self.dtype.itemsize + 2 * _FP32) + self.hidden_size * self.dtype.itemsize)
        reading = self._forward(rows, tokens)
        if reading > hidden + logits:
            return Counter({ACTIVATIONS: reading})
        return Counter({ACTIVATIONS: hidden, LOGITS: logits})

    def _forward(self, rows: int, tokens: int) -> int:
        """Activations of a forward pass without gradients at the peak of a block."""
        numbers = rows * tokens * self.hidden_size
        explicit = 3 * rows * self.num_heads * tokens**2 + _ATTENTION * numbers if self.explicit_attention else 0
        return max(_MLP * numbers, explicit) * self.dtype.itemsize


def encode_images(settings: Mapping[str, Any], *, batch: int, edge: int) -> Counter[str]:
    """Bytes besides the weights while the image tokenizer encodes images of `edge` pixels.

    Args:
        settings: constructor arguments of the VQ-VAE.
        batch, edge: number of images, and their pixels along an edge.
    """
    pixels, hidden = batch * edge**2, settings["hidden_size"]
    # uint8, 0..1 and normalised images; output of the first convolution (a quarter of the pixels) and of the second
    convolutions = pixels * (3 * (1 + 2 * _FP32) + _FP32 * hidden * 5 // 16)
    codes, size = pixels // settings["downsampling"] ** 2, settings["codebook_size"]
    distances = min(_SEARCH, codes * size * _FP32)
    search = pixels * 3 * _FP32 + distances + (2 * codes + size) * settings["codebook_dim"] * _FP32
    return Counter({ACTIVATIONS: max(convolutions, search)})


def decode_images(settings: Mapping[str, Any], *, batch: int, edge: int) -> Counter[str]:
    """Bytes besides the weights while the image tokenizer decodes images of `edge` pixels.

    The last transposed convolution reads `hidden_size` channels on a quarter of the pixels and writes as many on all.
    """
    pixels = batch * edge**2
    vectors = pixels // settings["downsampling"] ** 2 * settings["codebook_dim"]
    return Counter({ACTIVATIONS: (pixels * settings["hidden_size"] * 5 // 4 + vectors) * _FP32})
