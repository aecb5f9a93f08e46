"""Linear maps by oneDNN, wherever that is the faster library: the numbers of the default one, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.kernels.cpu_linear import Linear, by_convolution, linear, matmul


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize("shape", [(300, 24), (4, 100, 24), (3, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", [linear, by_convolution])
def test_results_and_gradients_are_those_of_the_plain_form(
    form: Callable[..., Tensor], shape: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    inputs = [x, *Linear(24, 40, bias=bias).parameters()]
    slope = torch.randn(*shape[:-1], 40)
    wanted = F.linear(*inputs)
    found = form(*inputs)
    assert found.shape == wanted.shape
    assert _relative(found, wanted) < 1e-5
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, slope), torch.autograd.grad(wanted, inputs, slope), strict=True
    ):
        assert _relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("form", [linear, by_convolution])
def test_input_may_be_strided(form: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(24, 512).T, torch.randn(40, 24)
    assert _relative(form(x, weight), F.linear(x, weight)) < 1e-5


def test_other_precisions_are_kept() -> None:
    module = Linear(24, 40)
    x = torch.randn(512, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    assert module.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_product_is_the_matrix_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 24, dtype=dtype), torch.randn(24, 40, dtype=dtype).T
    found = matmul(x, weight)
    assert found.dtype == dtype
    assert _relative(found.double(), x.double() @ weight.double().T) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
