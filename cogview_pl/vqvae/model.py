"""The image tokenizer: a convolutional VQ-VAE (paper section 3.2; topology of the released weights).

Shapes: B batch, Y X image edges, y x = Y, X / downsampling, C hidden size, D codebook_dim, K codebook_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cogview_pl.errors import UserError
from cogview_pl.kernels.fused_conv import can_fuse, encode_by_fused_convolutions
from cogview_pl.vqvae.quantizer import Quantizer, QuantizerOutput


class VQVAEOutput(NamedTuple):
    """`reconstruction (B, 3, Y, X)`, 0 black .. 1 white, not clipped; `quantized`: the quantizer's result."""

    reconstruction: Tensor
    quantized: QuantizerOutput


class ResidualBlock(nn.Module):
    """`x + conv1x1(relu(conv3x3(relu(x))))`, `(B, channels, y, x)` to the same shape."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, hidden, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def build_encoder(hidden_size: int, codebook_dim: int, num_strides: int, residual_blocks: int) -> nn.Sequential:
    """`(B, 3, Y, X)` -> `(B, D, y, x)`: strided convolutions, residual blocks, 1x1 convolution."""
    layers: list[nn.Module] = []
    for i in range(num_strides):
        layers += [
            nn.Conv2d(hidden_size if i else 3, hidden_size, kernel_size=4, stride=2, padding=1),
            nn.ReLU(inplace=True),
        ]
    layers += [ResidualBlock(hidden_size, hidden=hidden_size) for _ in range(residual_blocks)]
    layers.append(nn.Conv2d(hidden_size, codebook_dim, kernel_size=1))
    return nn.Sequential(*layers)


def build_decoder(hidden_size: int, codebook_dim: int, num_strides: int, residual_blocks: int) -> nn.Sequential:
    """`(B, D, y, x)` -> `(B, 3, Y, X)`: the encoder's mirror; residual blocks work on the code grid."""
    layers: list[nn.Module] = [ResidualBlock(codebook_dim, hidden=hidden_size) for _ in range(residual_blocks)]
    for i in range(num_strides):
        in_channels = hidden_size if i else codebook_dim
        layers += [
            nn.ConvTranspose2d(in_channels, hidden_size, kernel_size=4, stride=2, padding=1),
            nn.ReLU(inplace=True),
        ]
    layers.append(nn.Conv2d(hidden_size, 3, kernel_size=1))
    return nn.Sequential(*layers)


class VQVAE(nn.Module):
    """Images to a grid of codes and back.

    Images go in and come out on the scale 0 black .. 1 white; `mean` and `std` (per channel, on that scale)
    normalise inside the model. With downsampling 8, no residual blocks, hidden size 512 and codebook_dim 256 the
    parameters have the shapes of the released tokenizer.

    Raises UserError for settings that do not fit together.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        hidden_size: int,
        codebook_dim: int,
        codebook_size: int,
        downsampling: int,
        residual_blocks: int,
        quantizer: Quantizer,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if downsampling not in (4, 8, 16):
            raise UserError(f"image_tokenizer.downsampling is {downsampling}: choose 4, 8 or 16")
        if (quantizer.codebook_size, quantizer.codebook_dim) != (codebook_size, codebook_dim):
            raise UserError(
                f"image_tokenizer.quantizer has {quantizer.codebook_size} codes of size {quantizer.codebook_dim}, "
                f"the model codebook_size={codebook_size} and codebook_dim={codebook_dim}: give both the same numbers"
            )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError(f"image_tokenizer.mean={mean}, std={std}: give three numbers each, std above 0")
        self._downsampling = downsampling
        num_strides = downsampling.bit_length() - 1
        self.encoder = build_encoder(hidden_size, codebook_dim, num_strides, residual_blocks)
        self.decoder = build_decoder(hidden_size, codebook_dim, num_strides, residual_blocks)
        self.quantizer = quantizer
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    @property
    def codebook_size(self) -> int:
        """Size K of the codebook; codes lie in `[0, K)`."""
        return self.quantizer.codebook_size

    @property
    def downsampling(self) -> int:
        """Pixels along an edge per code."""
        return self._downsampling

    def latents(self, images: Tensor) -> Tensor:
        """Encoder output before quantization: `(B, 3, Y, X)` -> `(B, D, y, x)`.

        Raises UserError when an edge is not a multiple of `downsampling`.
        """
        height, hidden_size = images.shape[-2:]
        if height % self.downsampling or hidden_size % self.downsampling:
            raise UserError(
                f"image of {height} x {hidden_size} pixels: both edges must be multiples of {self.downsampling} "
                "(image_tokenizer.downsampling); resize or crop it"
            )
        normalised = (images - self.mean) / self.std
        if can_fuse(normalised):
            return encode_by_fused_convolutions(self.encoder, normalised)
        return self.encoder(normalised)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes of images: float `(B, 3, Y, X)`, 0 black .. 1 white -> int64 `(B, y, x)`."""
        latents_ByxD = self.latents(images).permute(0, 2, 3, 1)
        codes_N = self.quantizer.lookup(latents_ByxD.flatten(0, 2))
        return codes_N.view(latents_ByxD.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes: int64 `(B, y, x)` -> float `(B, 3, Y, X)` on the scale 0..1, not clipped."""
        return self._image(self.quantizer.embed(codes).permute(0, 3, 1, 2))

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Reconstruct images `(B, 3, Y, X)`; in training mode this also moves an EMA codebook."""
        quantized = self.quantizer(self.latents(images))
        return VQVAEOutput(self._image(quantized.quantized), quantized)

    def reconstruct_continuous(self, images: Tensor) -> Tensor:
        """Images `(B, 3, Y, X)` through encoder and decoder without quantization: a plain autoencoder."""
        return self._image(self.latents(images))

    def _image(self, vectors: Tensor) -> Tensor:
        return self.decoder(vectors) * self.std + self.mean
