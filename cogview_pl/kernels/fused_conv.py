"""The encoder on a GPU without gradients: bias and ReLU run inside the kernels of the convolutions.

The largest feature maps have hundreds of megabytes, so each pass over them costs time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.kernels.availability import on_nvidia

_FEWEST_CHANNELS = 8  # with fewer channels a convolution runs without tensor cores, at a fraction of the speed


def can_fuse(images: Tensor) -> bool:
    """Whether cuDNN has these kernels for the device of a tensor and no gradients are needed."""
    return on_nvidia(images.device) and torch.backends.cudnn.is_available() and not torch.is_grad_enabled()


def encode_by_fused_convolutions(encoder: nn.Sequential, images: Tensor) -> Tensor:
    """Output of the encoder for `(B, 3, Y, X)`, in the precision of autocast if it is enabled."""
    autocast = torch.is_autocast_enabled("cuda")
    x = images.to(torch.get_autocast_dtype("cuda") if autocast else images.dtype)
    layers = list(encoder)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Conv2d) and isinstance(following, nn.ReLU):
            x = _convolution_and_relu(x, layer)
        elif not isinstance(layer, nn.ReLU):
            x = layer(x)
    return x


def _convolution_and_relu(x: Tensor, layer: nn.Conv2d) -> Tensor:
    weight, bias = layer.weight.to(x.dtype), layer.bias
    missing = _FEWEST_CHANNELS - x.shape[1]
    if missing > 0:
        x, weight = (F.pad(tensor, (0, 0, 0, 0, 0, missing)) for tensor in (x, weight))
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    assert bias is not None and not isinstance(layer.padding, str)
    return torch.cudnn_convolution_relu(
        x, weight, bias.to(x.dtype), layer.stride, layer.padding, layer.dilation, layer.groups
    )
