"""Memory of inference, by arithmetic: weights, KV cache, packed weights, activations of the widest layer, logits.

Shapes: B rows, L tokens, D hidden size, S cached positions, n ids that a token is sampled from.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch

from cogview_pl.assembly.model_specs import ImageTokenizerSpec, SequenceModelSpec
from cogview_pl.checkpoints.model_folder import build_tokenizer, build_transformer
from cogview_pl.generation.config import Engine, Quantization
from cogview_pl.generation.decode import SCORED
from cogview_pl.generation.engine.forms import takes_compiled
from cogview_pl.generation.engine.packed_cpu import packed_bytes
from cogview_pl.generation.quantization import matrix_bytes
from cogview_pl.generation.super_resolution.parallel_windows import timetable
from cogview_pl.kernels.cpp_library import has_compiler
from cogview_pl.kernels.cpu_decoding import WIDTH
from cogview_pl.memory.phases import ACTIVATIONS, FP32, LOGITS
from cogview_pl.transformer.config import AttentionForm, Norm, NormScope
from cogview_pl.vocab import CodeSlot, TextSlot
from cogview_pl.vqvae.codebook import BLOCK_VALUES
from cogview_pl.vqvae.external import EXTERNAL

_MLP = 12  # (B, L, D) tensors at the peak of a block: 8 before and after GELU; the others are its input and norms
_ATTENTION = 7  # (B, L, D) tensors besides the scores of explicit attention
_SAMPLING, _TOP_P = 20, 25  # bytes besides each logit: probabilities in fp32, their sums in fp64; what top-p sorts
_SEARCH = 2 * BLOCK_VALUES * FP32  # two blocks of distances between vectors and codes


@dataclass(frozen=True)
class InferenceModel:
    """A sequence model with its image tokenizer on one device. `decode`, `double` and `score` leave out the weights.

    Attributes:
        spec: sizes and layout.
        dtype: of the weights.
        parts: devices among which tensor parallelism divides the blocks.
        quantization: number format of the blocks' matrices; None: that of the weights.
        on_gpu: whether the device is a GPU.
        engine: what decodes on a CPU.
    """

    spec: SequenceModelSpec
    dtype: torch.dtype
    parts: int = 1
    quantization: Quantization | None = None
    on_gpu: bool = False
    engine: Engine = Engine.torch

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the full model."""
        with torch.device("meta"):  # one block stands for all, because a large model takes half a second
            model = build_transformer({**self.spec.settings, "num_layers": 1})
        layers, block = self.spec.settings["num_layers"], model.blocks[0]
        one, whole = (sum(parameter.numel() for parameter in part.parameters()) for part in (block, model))
        return whole + (layers - 1) * one

    @property
    def _compiled(self) -> bool:
        """Whether the compiled step decodes, which reads the weights where they are; see `can_compile`."""
        settings = self.spec.settings
        return (
            not self.on_gpu
            and self.parts == 1
            and self.quantization != Quantization.int4
            and settings["norm_scope"] != NormScope.tensor.value
            and settings["norm"] != Norm.post.value
            and settings["attention"] == AttentionForm.fused.value
            and settings["hidden_size"] // settings["num_heads"] % WIDTH == 0
            and has_compiler()
            and takes_compiled(self.engine, self.dtype)
        )

    @cached_property
    def bytes(self) -> int:
        """Bytes of the weights on the device."""
        layers, hidden_size = self.spec.settings["num_layers"], self.spec.settings["hidden_size"]
        matrices = 12 * layers * hidden_size**2
        divided = matrices + 7 * layers * hidden_size  # with the biases of `qkv` and `up`
        size = (self.parameters - divided + divided // self.parts) * self.dtype.itemsize
        if self.quantization is None:
            return size
        return size - matrices * self.dtype.itemsize + int(layers * matrix_bytes(self.quantization, hidden_size))

    @property
    def held(self) -> Counter[str]:
        """Bytes of all weights."""
        return Counter(sequence_models=self.bytes, image_tokenizer=image_tokenizer_bytes(self.spec.images))

    def decode(
        self,
        rows: int,
        *,
        text_tokens: int | None = None,
        drafts: int = 0,
        sorts: bool = False,
        more: int = 0,
        completes: bool = False,
    ) -> Counter[str]:
        """The target slot is sampled, token by token, after the longest prompt.

        Args:
            rows: B; guidance takes two rows per image.
            text_tokens: of the longest prompt; None: a full slot.
            drafts: codes that Jacobi decoding looks ahead.
            sorts: whether top-p sorts the probabilities.
            more: positions that the cache has besides those of one sequence.
            completes: whether codes are given, of which up to all of a grid are read in one pass and scored.
        """
        template = self.spec.template
        layers, hidden_size = self.spec.settings["num_layers"], self.spec.settings["hidden_size"]
        longest = {slot.name: [0] * slot.length for slot in template.slots}
        if text_tokens is not None:
            longest |= {
                slot.name: longest[slot.name][:text_tokens] for slot in template.slots if isinstance(slot, TextSlot)
            }
        prompt = len(template.prompt(longest))
        ids = sum(map(len, template.allowed(template.target)))
        looks_ahead = 2 * (drafts + 1) if drafts else 0
        numbers = layers * hidden_size * rows * (prompt + template.target.length + looks_ahead + more)
        cache = 2 * numbers * (self.dtype.itemsize if self.on_gpu else FP32) // self.parts  # keys and values
        if self.spec.settings["norm_scope"] == "tensor":  # the input of every layer instead
            cache = numbers * self.dtype.itemsize
        packed = 0
        if not (self.on_gpu or self._compiled):
            quantized = self.quantization is not None or self.parts > 1
            packed = packed_bytes(
                rows=rows, layers=layers, hidden_size=hidden_size, ids=ids, dtype=self.dtype, quantized=quantized
            )
        logits = max(drafts + 1, SCORED if completes else 0)  # positions
        sampling = rows * logits * ids * (self.dtype.itemsize + (_TOP_P if sorts else _SAMPLING))
        prefill = self._forward(rows, prompt + template.target.length * completes)
        step = {ACTIVATIONS: prefill} if prefill > sampling else {LOGITS: sampling}
        return Counter({"kv_cache": cache, "packed_weights": packed, **step})

    def double(self, images: int, *, sorts: bool = False) -> Counter[str]:
        """An upscaler decodes the windows of images in parallel; each running window has its own rows of the cache."""
        assert isinstance(self.spec.template.target, CodeSlot)
        grid = self.spec.template.target.grid[0]
        lanes = 1 + max(turn.lane for step in timetable(grid) for turn in step)
        return self.decode(images * lanes, sorts=sorts, more=grid)

    def score(self, rows: int) -> Counter[str]:
        """A captioner scores the texts of `rows` images."""
        template, hidden_size, size = self.spec.template, self.spec.settings["hidden_size"], self.dtype.itemsize
        tokens, scored = template.length - 1, template.target.length + 1
        hidden = rows * tokens * hidden_size * size
        ids = len(template.predicted(template.target))
        logits = rows * scored * (ids * (size + 2 * FP32) + hidden_size * size)
        forward = self._forward(rows, tokens)
        return Counter({ACTIVATIONS: forward} if forward > hidden + logits else {ACTIVATIONS: hidden, LOGITS: logits})

    def _forward(self, rows: int, tokens: int) -> int:
        """A forward pass without gradients, at the peak of a block."""
        numbers = rows * tokens * self.spec.settings["hidden_size"]
        peak = _MLP * numbers
        if self.spec.settings["attention"] != "fused":  # scores exist as a tensor
            peak = max(peak, _ATTENTION * numbers + 3 * rows * self.spec.settings["num_heads"] * tokens**2)
        return peak * self.dtype.itemsize


def image_tokenizer_bytes(images: ImageTokenizerSpec) -> int:
    """Bytes of the weights and the codebook of an image tokenizer; ours are fp32 always."""
    with torch.device("meta"):
        model = build_tokenizer(images.settings)
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def encode_images(images: ImageTokenizerSpec, batch: int, *, scale: int = 1) -> Counter[str]:
    """Bytes besides the weights while a batch is encoded of images whose edge is `scale` times that of the spec."""
    settings, pixels = images.settings, batch * (scale * images.edge) ** 2
    if EXTERNAL in settings:
        return Counter()  # its layers are unknown
    # uint8, 0..1 and normalised images; output of the first convolution (a quarter of the pixels) and of the second
    convolutions = pixels * (3 * (1 + 2 * FP32) + FP32 * settings["hidden_size"] * 5 // 16)
    codes, size = pixels // settings["downsampling"] ** 2, settings["codebook_size"]
    distances = min(_SEARCH, codes * size * FP32)
    search = pixels * 3 * FP32 + distances + (2 * codes + size) * settings["codebook_dim"] * FP32
    return Counter({ACTIVATIONS: max(convolutions, search)})


def decode_images(images: ImageTokenizerSpec, batch: int, *, scale: int = 1) -> Counter[str]:
    """Bytes besides the weights while a batch is decoded of images whose edge is `scale` times that of the spec.

    The last transposed convolution reads `hidden_size` channels on a quarter of the pixels and writes them on all.
    """
    settings, pixels = images.settings, batch * (scale * images.edge) ** 2
    if EXTERNAL in settings:
        return Counter()
    vectors = pixels // settings["downsampling"] ** 2 * settings["codebook_dim"]
    return Counter({ACTIVATIONS: (pixels * settings["hidden_size"] * 5 // 4 + vectors) * FP32})
