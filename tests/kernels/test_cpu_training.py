"""The compiled training kernels: values and gradients of torch's operations, for any shape and number of threads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.kernels import cpp_library, cpu_training
from cogview_pl.transformer.block import SMALLEST_MAXIMUM, LayerNorm
from cogview_pl.transformer.config import NormScope
from cogview_pl.transformer.loss import sequence_loss
from cogview_pl.transformer.model import Transformer
from tests.make_models import make_transformer

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="the kernels need a C++ compiler"
)


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def _agree(
    ours: Callable[..., Tensor], wanted: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 2e-6
) -> None:
    """Values and gradients in fp32 against those in fp64, relative to the largest of each tensor."""
    inputs = tuple(x.requires_grad_() for x in inputs)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    found, reference = ours(*inputs), wanted(*wide)
    slope = torch.randn(found.shape)
    pairs = [
        (found, reference),
        *zip(
            torch.autograd.grad(found, inputs, slope),
            torch.autograd.grad(reference, wide, slope.double()),
            strict=True,
        ),
    ]
    for one, other in pairs:
        assert one.shape == other.shape
        assert float((one - other).detach().abs().max() / other.detach().abs().max()) < tolerance


@pytest.mark.parametrize("shape", [(2, 7, 96), (3, 1, 21), (5, 8), (1, 3)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_layer_norm(shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    plain = LayerNorm(shape[-1], NormScope.token).double()

    def by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        scaled = x / x.detach().abs().amax(-1, keepdim=True)
        return F.layer_norm(scaled, shape[-1:], weight, bias, plain.eps / 64)

    _agree(
        lambda *given: cpu_training.layer_norm(*given, 8 * SMALLEST_MAXIMUM, plain.eps / 64),
        by_torch,
        torch.randn(shape) * scale + scale,
        torch.randn(shape[-1]),
        torch.randn(shape[-1]),
        tolerance=1e-5,
    )


def test_layer_norm_of_zeros_is_the_bias() -> None:
    x, weight, bias = torch.zeros(3, 20, requires_grad=True), torch.ones(20), torch.randn(20)
    y = cpu_training.layer_norm(x, weight, bias, 8e-4, 1e-7)
    assert torch.equal(y, bias.expand(3, 20))
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(40, 33), (3,), (2, 3, 8)])
def test_gelu(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    _agree(cpu_training.gelu, lambda x: F.gelu(x, approximate="tanh"), torch.randn(shape) * 4)


def test_gelu_of_large_numbers() -> None:
    x = torch.tensor([-1e4, -30.0, 30.0, 1e4] * 3, requires_grad=True)
    y = cpu_training.gelu(x)
    assert torch.allclose(y, x.clamp(min=0))
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, (x > 0).float())


@pytest.mark.parametrize(
    ("lengths", "heads", "size"), [([37, 5, 0, 40], 2, 24), ([1], 1, 8), ([96, 33], 3, 10), ([5, 9], 1, 3)]
)
def test_causal_attention(lengths: list[int], heads: int, size: int) -> None:
    torch.manual_seed(0)
    starts = torch.tensor([0, *lengths]).cumsum(0)

    def by_torch(qkv_NE: Tensor) -> Tensor:
        parts = []
        for qkv_LE in qkv_NE.split(lengths):
            q, k, v = qkv_LE.view(-1, 3, heads, size).permute(1, 2, 0, 3)
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1))
        return torch.cat(parts)

    _agree(
        lambda qkv: cpu_training.causal_attention(qkv, starts, max(lengths), heads),
        by_torch,
        torch.randn(sum(lengths), 3 * heads * size) * 3,
    )


@pytest.mark.parametrize("kernel", ["norm", "gelu", "attention"])
def test_what_is_not_a_number_stays_so(kernel: str) -> None:
    """Otherwise the guard against them would not see them."""
    x = torch.randn(2, 24)
    x[0, 20] = float("nan")
    starts = torch.tensor([0, 1, 2])
    y = {
        "norm": lambda: cpu_training.layer_norm(x, torch.ones(24), torch.zeros(24), 8e-4, 1e-7),
        "gelu": lambda: cpu_training.gelu(x),
        "attention": lambda: cpu_training.causal_attention(x, starts, 1, 1),
    }[kernel]()
    assert y[0].isnan().any()
    assert y[1].isfinite().all()


def _loss_and_gradients(model: Transformer, weights: Tensor) -> list[Tensor]:
    """Of a batch with these loss weights; all parameters have a gradient."""
    batch, length = weights.shape
    tokens = torch.randint(60, (batch, length), generator=torch.Generator().manual_seed(1))
    positions, slots = torch.arange(length).expand(batch, -1), torch.zeros(batch, length, dtype=torch.long)
    model.zero_grad()
    loss = sequence_loss(model, tokens, positions, weights, slots, 1).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def _weights(kind: str) -> Tensor:
    """Loss on all tokens; on the last ones, with padding behind; or on none of a sequence."""
    weights = torch.ones(3, 30)
    if kind != "all":
        weights[:, :20] = 0
        weights[0, 25:], weights[1, 28:] = 0, 0
    if kind == "none of one":
        weights[2] = 0
    return weights


@pytest.mark.parametrize("norm", ["sandwich", "pre", "post"])
@pytest.mark.parametrize("kind", ["all", "end", "none of one"])
def test_a_model_learns_the_same(norm: str, kind: str) -> None:
    torch.manual_seed(0)
    model = make_transformer(
        vocab_size=60, num_layers=2, hidden_size=48, num_heads=2, num_positions=40, norm=norm
    ).train()
    weights = _weights(kind)
    wanted = _loss_and_gradients(model, weights)
    model.set_cpu_kernels(True)
    found = _loss_and_gradients(model, weights)
    assert not all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))  # other kernels ran
    largest = max(float(gradient.abs().max()) for gradient in wanted[1:])
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) < 1e-5 * largest
    again = _loss_and_gradients(model, weights)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_a_batch_without_targets_has_gradients_of_zero() -> None:
    model = make_transformer(vocab_size=60, num_layers=2, hidden_size=48, num_heads=2, num_positions=40).train()
    model.set_cpu_kernels(True)
    loss, *gradients = _loss_and_gradients(model, torch.zeros(1, 2))
    assert loss == 0
    assert len(gradients) == len([*model.parameters()])
    assert all(not gradient.any() for gradient in gradients)


def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "three.cpp"
    source.write_text('extern "C" int three() { return 3; }')
    assert not cpp_library.Library(source).is_compiled()
    assert cpp_library.Library(source).load().three() == 3
    assert cpp_library.Library(source).is_compiled()
    source.write_text('extern "C" int three() { return 4; }')
    assert not cpp_library.Library(source).is_compiled()


def test_why_there_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int three() { return; }")
    with pytest.raises(cpp_library.NoLibraryError, match=r"did not make a library of broken\.cpp \(return-statement"):
        cpp_library.Library(source).load()
    monkeypatch.setenv("CXX", "false")  # says no version either
    for use in (cpp_library.Library(source).is_compiled, cpp_library.Library(source).load):
        with pytest.raises(cpp_library.NoLibraryError, match=r"false did not make a library of broken\.cpp"):
            use()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(cpp_library.NoLibraryError, match=r"no C\+\+ compiler was found \(/nowhere/g\+\+\)"):
        cpp_library.Library(source).load()
