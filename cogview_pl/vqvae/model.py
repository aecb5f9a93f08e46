"""The image tokenizer: a convolutional VQ-VAE (paper section 3.2; topology of the released weights).

Shapes: B batch, Y X image edges, y x = Y, X / downsampling, C hidden size, D codebook_dim, K codebook_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cogview_pl.errors import UserError
from cogview_pl.kernels.fused_conv import can_fuse, encode_by_fused_convolutions
from cogview_pl.vqvae.config import VQVAEConfig
from cogview_pl.vqvae.quantizer_base import QuantizerOutput
from cogview_pl.vqvae.quantizer_registry import build_quantizer


class VQVAEOutput(NamedTuple):
    """`reconstruction (B, 3, Y, X)`, 0 black .. 1 white, not clipped; `quantized`: output of the quantizer."""

    reconstruction: Tensor
    quantized: QuantizerOutput


class ResidualBlock(nn.Module):
    """`x + conv1x1(relu(conv3x3(relu(x))))` of `(B, channels, y, x)`."""

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


def build_encoder(config: VQVAEConfig) -> nn.Sequential:
    """`(B, 3, Y, X)` -> `(B, D, y, x)`: strided convolutions, residual blocks, 1x1 convolution."""
    width = config.hidden_size
    layers: list[nn.Module] = []
    for stride in range(_num_strides(config)):
        layers += [nn.Conv2d(width if stride else 3, width, kernel_size=4, stride=2, padding=1), nn.ReLU(inplace=True)]
    layers += [ResidualBlock(width, hidden=width) for _ in range(config.residual_blocks)]
    layers.append(nn.Conv2d(width, config.codebook_dim, kernel_size=1))
    return nn.Sequential(*layers)


def build_decoder(config: VQVAEConfig) -> nn.Sequential:
    """`(B, D, y, x)` -> `(B, 3, Y, X)`: the encoder mirrored; residual blocks work on the grid of codes."""
    width, inputs = config.hidden_size, config.codebook_dim
    layers: list[nn.Module] = [ResidualBlock(inputs, hidden=width) for _ in range(config.residual_blocks)]
    for stride in range(_num_strides(config)):
        channels = width if stride else inputs
        layers += [nn.ConvTranspose2d(channels, width, kernel_size=4, stride=2, padding=1), nn.ReLU(inplace=True)]
    layers.append(nn.Conv2d(width, 3, kernel_size=1))
    return nn.Sequential(*layers)


def _num_strides(config: VQVAEConfig) -> int:
    return config.downsampling.bit_length() - 1


class VQVAE(nn.Module):
    """Images to a grid of codes and back.

    Images have the scale 0 black .. 1 white; the model normalises them by `mean` and `std` (per channel). With
    downsampling 8, no residual blocks, hidden size 512 and codebook_dim 256 the parameters have the shapes of the
    released tokenizer.

    Attributes:
        downsampling: pixels along an edge per code.

    Raises:
        UserError: options do not fit together, or see `build_quantizer`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        if config.downsampling not in (4, 8, 16):
            raise UserError(f"image_tokenizer.downsampling is {config.downsampling}: choose 4, 8 or 16")
        if len(config.mean) != 3 or len(config.std) != 3 or min(config.std) <= 0:
            raise UserError(
                f"image_tokenizer.mean={config.mean}, std={config.std}: give three numbers each, std above 0"
            )
        options = config.quantizer if isinstance(config.quantizer, Mapping) else vars(config.quantizer)
        # Made before the convolutions: the order of random draws decides which weights a seed gives.
        quantizer = build_quantizer(options, codebook_size=config.codebook_size, codebook_dim=config.codebook_dim)
        if (quantizer.codebook_size, quantizer.codebook_dim) != (config.codebook_size, config.codebook_dim):
            raise UserError(
                f"image_tokenizer.quantizer has {quantizer.codebook_size} codes of size {quantizer.codebook_dim}, "
                f"the model codebook_size={config.codebook_size} and codebook_dim={config.codebook_dim}: give both the "
                "same numbers"
            )
        self.downsampling = config.downsampling
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config)
        self.quantizer = quantizer
        self._codes_are_frozen = False
        self.register_buffer("mean", torch.tensor(config.mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std, dtype=torch.float32).view(3, 1, 1))

    @property
    def codebook_size(self) -> int:
        """Size K of the codebook; codes lie in `[0, K)`."""
        return self.quantizer.codebook_size

    def freeze_codes(self) -> None:
        """Leave encoder and codebook as they are in all later training: the decoder alone learns.

        All images keep their codes, so token stores and sequence models of this tokenizer stay valid.
        """
        self.encoder.requires_grad_(False)
        self.quantizer.requires_grad_(False)
        self._codes_are_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> VQVAE:
        """Set training mode; a frozen codebook stays in evaluation, in which it does not move."""
        super().train(mode)
        if self._codes_are_frozen:
            self.quantizer.eval()
        return self

    def latents(self, images: Tensor) -> Tensor:
        """Encoder output before quantization: `(B, 3, Y, X)` -> `(B, D, y, x)`.

        Raises UserError when an edge is not a multiple of `downsampling`.
        """
        height, width = images.shape[-2:]
        if height % self.downsampling or width % self.downsampling:
            raise UserError(
                f"image of {height} x {width} pixels: both edges must be multiples of {self.downsampling} "
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
        return self._image(self.quantizer.continuous(self.latents(images)))

    def _image(self, vectors: Tensor) -> Tensor:
        return self.decoder(vectors) * self.std + self.mean
