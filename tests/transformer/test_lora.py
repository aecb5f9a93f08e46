"""LoRA: what adapters compute, what trains, and that they can be added into the weights."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from cogview_pl.assembly.model_specs import transformer_settings
from cogview_pl.generation.config import Sampling
from cogview_pl.generation.decode import decode
from cogview_pl.transformer.config import ActivationCheckpointing, LoRAConfig, LoRATarget
from cogview_pl.transformer.flops import forward_flops, training_flops
from cogview_pl.transformer.lora import (
    LoRAEmbedding,
    LoRALinear,
    adapter_shapes,
    adapter_state,
    add_lora,
    merge,
)
from cogview_pl.transformer.loss import sequence_loss
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, Vocabulary
from tests.make_models import make_transformer

from ..composed import composed

VOCABULARY = Vocabulary(codebook_size=40, text_vocab_size=12)
TEMPLATE = Template(
    "[ROI1] {text} [BASE] [BOI1] {image:4x4} [EOI1]", target="image", loss={}, vocabulary=VOCABULARY, text_length=8
)
BLOCKS = (LoRATarget.qkv, LoRATarget.out, LoRATarget.up, LoRATarget.down)
WIDTH, RANK, ALPHA = 32, 4, 8.0


def make() -> Transformer:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": WIDTH, "num_heads": 4, "num_positions": 300, "init_std": WIDTH**-0.5}
    return make_transformer(vocab_size=VOCABULARY.size, **sizes).eval()  # type: ignore[arg-type]


def options(targets: Iterable[LoRATarget] = LoRATarget, rank: int = RANK, alpha: float = ALPHA) -> LoRAConfig:
    return LoRAConfig(rank=rank, alpha=alpha, targets=list(targets), merge=False)


def adapted(
    targets: Iterable[LoRATarget] = LoRATarget, held: torch.dtype = torch.float32, *, trained: bool = True
) -> Transformer:
    """The model of `make` with adapters, of which B is no longer zero if they are `trained`."""
    model = make()
    add_lora(model, options(targets), held=held)
    for name, parameter in model.named_parameters():
        if trained and name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.05)
    return model


def merged(model: Transformer) -> Transformer:
    """The model of `make` with the adapters of `model` in its weights."""
    whole = make()
    merge(whole, adapter_state(model), ALPHA)
    return whole


def tokens(length: int) -> Tensor:
    return torch.randint(VOCABULARY.size, (2, length), generator=torch.Generator().manual_seed(1))


def loss_of(model: Transformer) -> Tensor:
    """Of a batch that is long enough for the products of `cogview_pl.kernels.cpu_linear`."""
    ids = tokens(200)
    positions, slots = torch.arange(200).expand(2, -1), torch.zeros(2, 200, dtype=torch.long)
    return sequence_loss(model, ids, positions, torch.ones(2, 200), slots, 1).loss


def test_a_fresh_adapter_changes_nothing() -> None:
    ids = tokens(20)
    assert torch.equal(adapted(trained=False)(ids), make()(ids))
    assert not torch.allclose(adapted()(ids), make()(ids), atol=0.1)


@pytest.mark.parametrize(
    "targets",
    [BLOCKS, [LoRATarget.qkv], [LoRATarget.out, LoRATarget.down, LoRATarget.tokens], LoRATarget],
    ids=lambda targets: "+".join(target.value for target in targets),
)
@pytest.mark.parametrize("length", [20, 290], ids=["few_rows", "many_rows"])  # many are oneDNN's
@torch.no_grad()
def test_merged_and_unmerged_agree(length: int, targets: Iterable[LoRATarget]) -> None:
    model, plain = adapted(targets), make().state_dict()
    whole = merged(model)
    assert (whole(tokens(length)) - model(tokens(length))).abs().max() < 1e-5
    assert whole.state_dict().keys() == plain.keys()
    changed = {name.rpartition(".")[0] + ".weight" for name in adapter_state(model)}
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, plain[name]) != (name in changed), name


@torch.no_grad()
def test_decoding_with_adapters_draws_what_the_merged_model_draws() -> None:
    prompts = [TEMPLATE.prompt({"text": text}) for text in ([3, 1, 4], [])]
    model = adapted()
    whole = merged(model)
    rows = [decode(m, TEMPLATE, prompts, seeds=[0, 1], sampling=Sampling()) for m in (model, whole, make())]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize("checkpointing", ActivationCheckpointing)
def test_gradients_are_those_that_the_chain_rule_gives(checkpointing: ActivationCheckpointing) -> None:
    """∂/∂B = α/R · G · Aᵀ and ∂/∂A = α/R · Bᵀ · G, G the gradient of the merged weight."""
    model = adapted()
    whole = merged(model)
    model.set_activation_checkpointing(checkpointing)
    loss_of(model).backward()
    loss_of(whole).backward()
    for name, part in model.named_modules():
        if isinstance(part, (LoRALinear, LoRAEmbedding)):
            gradient = whole.get_submodule(name).weight.grad
            assert isinstance(gradient, Tensor)
            wanted_a, wanted_b = part.scale * part.lora_b.T @ gradient, part.scale * gradient @ part.lora_a.T
            torch.testing.assert_close(part.lora_a.grad, wanted_a, atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(part.lora_b.grad, wanted_b, atol=1e-5, rtol=1e-3)


def test_training_moves_the_adapters_and_nothing_else() -> None:
    model = adapted(trained=False)
    before = deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    trained = adapter_state(model)
    assert trained.keys() == adapter_shapes(make(), options()).keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


def test_the_frozen_part_in_half_precision_is_what_autocast_would_make_of_it() -> None:
    outputs = []
    for held in (torch.float32, torch.bfloat16):
        model = adapted(held=held)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        outputs.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(tensor.dtype == torch.float32 for tensor in outputs[1])
    for fp32, bf16 in zip(*outputs, strict=True):
        assert torch.equal(fp32, bf16)
    held_bytes = sum(p.nbytes for p in adapted(held=torch.bfloat16).blocks.parameters() if not p.requires_grad)
    assert held_bytes < 0.55 * sum(p.nbytes for p in make().blocks.parameters())


@torch.no_grad()
def test_a_model_whose_frozen_part_is_in_half_precision_runs_without_autocast() -> None:
    """As the callback runs it that generates images during training."""
    found, exact = adapted(held=torch.bfloat16)(tokens(20)), adapted()(tokens(20))
    assert 0 < (found - exact).norm() / exact.norm() < 0.05


def test_int8_weights_can_be_frozen_ones() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = adapted()
    exact = loss_of(model)
    config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    quantization.quantize_(model.blocks, config)
    loss = loss_of(model)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_training_step_takes_no_products_for_frozen_weights() -> None:
    model, plain = adapted(BLOCKS), make()
    batch, length = 2, 9
    arguments = torch.ones(batch, length), torch.zeros(batch, length, dtype=torch.long)
    whole = int(forward_flops(plain, *arguments))
    assert int(training_flops(plain, *arguments)) == 3 * whole
    frozen = 2 * 12 * WIDTH**2 * 2 * batch * (length - 1)  # two layers, an operation for each of × and +
    head = 2 * WIDTH * VOCABULARY.size * batch * (length - 1)
    beside = 2 * 16 * RANK * WIDTH * 2 * batch * (length - 1)
    assert int(training_flops(model, *arguments)) == 3 * (whole + beside) - frozen - head
    assert int(training_flops(adapted(), *arguments)) == 3 * (whole + beside) - frozen


@pytest.mark.parametrize(("size", "rank"), [("small", 4), ("base", 8), ("cogview_400m", 16), ("cogview_4b", 32)])
def test_adapters_are_less_than_a_fiftieth_of_the_model(size: str, rank: int) -> None:
    config = composed("task=style", f"model={size}")
    vocabulary = Vocabulary(config.image_tokenizer.codebook_size, config.text.vocab_size)
    with torch.device("meta"):
        model = make_transformer(**transformer_settings(config.model, vocabulary))
    counted = sum(parameter.numel() for parameter in model.parameters())
    shapes = adapter_shapes(model, options(BLOCKS, rank))
    add_lora(model, options(BLOCKS, rank, alpha=16))
    state = adapter_state(model)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert sum(tensor.numel() for tensor in state.values()) < 0.02 * counted
