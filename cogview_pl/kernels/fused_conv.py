"""The encoder on a GPU without gradients: bias and ReLU run inside the kernels of the convolutions.

The largest feature maps have hundreds of megabytes, so each pass over them costs time.

Shapes: B batch, Y X image edges, y x edges of a convolution's output, C channels, k kernel edge, M output channels.
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
    missing = _FEWEST_CHANNELS - x.shape[1]
    if missing > 0 and x.dtype != torch.float32:  # in fp32 a product runs without tensor cores, a convolution in TF32
        return convolution_as_product(x, layer)
    weight, bias = layer.weight.to(x.dtype), layer.bias
    if missing > 0:
        x, weight = (F.pad(tensor, (0, 0, 0, 0, 0, missing)) for tensor in (x, weight))
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    assert bias is not None and not isinstance(layer.padding, str)
    return torch.cudnn_convolution_relu(
        x, weight, bias.to(x.dtype), layer.stride, layer.padding, layer.dilation, layer.groups
    )


def convolution_as_product(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """ReLU of a convolution of few channels, as one matmul of its patches: `(B, C, Y, X)` -> `(B, M, y, x)`.

    Its k · k · C inputs are fewer than those of a convolution whose channels are padded. The result is channels last.
    """
    assert layer.bias is not None and not isinstance(layer.padding, str)
    edge, stride, margin = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    padded_BYXC = F.pad(x.permute(0, 2, 3, 1), (0, 0, margin, margin, margin, margin)).contiguous()
    batch, height, width, channels = padded_BYXC.shape
    rows, columns = (height - edge) // stride + 1, (width - edge) // stride + 1
    line = width * channels
    # Pixels of a patch's row lie side by side: a patch is k rows of k · C numbers.
    patches = padded_BYXC.as_strided(
        (batch, rows, columns, edge, edge * channels), (height * line, stride * line, stride * channels, line, 1)
    )
    weight_MP = layer.weight.to(x.dtype).permute(0, 2, 3, 1).reshape(layer.out_channels, -1)
    # Private name of torch, checked against 2.14: bias and ReLU in the matmul's kernel.
    found_NM = torch._addmm_activation(layer.bias.to(x.dtype), patches.reshape(batch * rows * columns, -1), weight_MP.T)
    return found_NM.view(batch, rows, columns, -1).permute(0, 3, 1, 2)
