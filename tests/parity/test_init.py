"""Fresh models against the original: spread of the initial values, weight decay, the warm-up of the learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from cogview_pl.checkpoints.released import save_transformer
from cogview_pl.lit.schedule import warmup_cosine
from cogview_pl.transformer.model import Transformer
from tests.make_models import make_transformer, make_vqvae

from .conftest import Records

INIT_STD = 0.02
SIGMAS = 5.0  # by chance one statistic in two million is farther off


@pytest.fixture(scope="module")
def init(parity: Records) -> dict[str, Any]:
    return parity.json("init/init.json")


@pytest.fixture(scope="module")
def transformer(init: dict[str, Any]) -> Transformer:
    torch.manual_seed(0)
    config = init["config"]
    return make_transformer(
        vocab_size=config["vocab_size"],
        num_layers=config["num_layers"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_positions=config["max_position_embeddings"],
        init_std=INIT_STD,
    )


@pytest.fixture(scope="module")
def kinds(transformer: Transformer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """Our fresh tensors under the original's names, those of all layers together."""
    folder = tmp_path_factory.mktemp("fresh")
    save_transformer(transformer, folder, iteration=1)
    found: dict[str, list[Tensor]] = {}
    for name, tensor in torch.load(folder / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"].items():
        found.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(tensor)
    return found


def assert_spread(values: Tensor, std: float, what: str) -> None:
    """Mean 0 and the given standard deviation, as far as chance allows (flat and normal values alike)."""
    error = std / math.sqrt(values.numel())
    assert abs(values.mean().item()) < SIGMAS * error, what
    assert abs(values.std().item() - std) < SIGMAS * error / math.sqrt(2), what


class TestTransformer:
    def test_shapes(self, init: dict[str, Any], transformer: Transformer, kinds: dict[str, list[Tensor]]) -> None:
        found = {kind: (len(tensors), [*tensors[0].shape]) for kind, tensors in kinds.items()}
        assert found == {kind: (record["tensors"], record["shape"]) for kind, record in init["kinds"].items()}
        assert sum(parameter.numel() for parameter in transformer.parameters()) == init["total_parameters"]

    def test_initial_values(self, init: dict[str, Any], kinds: dict[str, list[Tensor]]) -> None:
        for kind, record in init["kinds"].items():
            values = torch.stack(kinds[kind]).flatten()
            expected = record["expected_std"]
            if isinstance(expected, str):
                assert torch.equal(values, torch.full_like(values, {"zeros": 0.0, "ones": 1.0}[expected])), kind
            else:
                assert_spread(values, expected, kind)
                assert values.std().item() == pytest.approx(record["std"], rel=2 * SIGMAS / math.sqrt(2 * len(values)))

    def test_weight_decay(self, init: dict[str, Any], transformer: Transformer) -> None:
        matrices, tables, plain = transformer.parameter_groups()
        decayed = [*matrices, *tables]
        sizes = {"decay": sum(p.numel() for p in decayed), "no_decay": sum(p.numel() for p in plain)}
        assert sizes == init["groups"]
        # Kind by kind: a record says whether weight decay applies, ours goes by the number of dimensions.
        for kind, record in init["kinds"].items():
            assert (len(record["shape"]) > 1) == record["weight_decay"], kind
        assert all(p.ndim > 1 for p in decayed)
        assert all(p.ndim == 1 for p in plain)


def test_vqvae(init: dict[str, Any]) -> None:
    """All but `cluster_size`, which starts at 1 here on purpose (see `EMAQuantizer`)."""
    records = init["vqvae"]["parameters"]
    hidden_size = records["enc_b.blocks.0.weight"]["shape"][0]
    codebook_dim, codebook_size = records["quantize_t.embed"]["shape"]
    torch.manual_seed(0)
    model = make_vqvae(hidden_size=hidden_size, codebook_dim=codebook_dim, codebook_size=codebook_size)
    quantizer = model.quantizer
    found = {"quantize_t.embed": quantizer.codebook, "quantize_t.embed_avg": quantizer.embed_avg}
    for name, parameter in model.named_parameters():
        found[name.replace("encoder", "enc_b.blocks").replace("decoder", "dec.blocks")] = parameter.detach()
    assert {*found, "quantize_t.cluster_size"} == records.keys()
    assert sum(parameter.numel() for parameter in model.parameters()) == init["vqvae"]["total_parameters"]
    assert torch.equal(quantizer.embed_avg, quantizer.codebook) == init["vqvae"]["embed_avg_equals_embed"]

    for name, values in found.items():
        bound = vqvae_bound(name, records)
        assert [*values.shape] == records[name]["shape"], name
        for minimum, maximum in [(values.min(), values.max()), (records[name]["min"], records[name]["max"])]:
            assert -bound <= minimum <= maximum <= bound, name
        assert_spread(values, bound / math.sqrt(3), name)


def vqvae_bound(name: str, records: Mapping[str, Any]) -> float:
    """Bound of the uniform distribution that a tensor of the tokenizer starts from."""
    if name.startswith("quantize_t"):
        bound = 5 / 3 * math.sqrt(6 / sum(records[name]["shape"]))
    else:  # PyTorch's default; a bias follows its weight
        bound = 1 / math.sqrt(math.prod(records[name.replace("bias", "weight")]["shape"][1:]))
    return bound * (1 + 1e-6)  # numbers are drawn in float32


def test_learning_rate(parity: Records) -> None:
    """Warm-up and final rate; in between ours differs: the cosine ends with the training, not `warmup` steps later.

    The original's rate at step s is the one after s calls, so its first update has rate 0. Ours is at its place in
    the warm-up one step earlier.
    """
    for record in parity.json("init/lr_schedule.json"):
        peak, steps = record["lr"], record["train_iters"]
        rising = record["warmup"] * steps
        factor = warmup_cosine(steps, record["warmup"], record["decay_ratio"])
        for step, rate in zip(record["steps"], record["values"], strict=True):
            if 1 <= step <= rising:
                assert peak * factor(step - 1) == pytest.approx(rate, rel=1e-9)
            elif record["style"] == "cosine" and step >= steps + rising:
                assert peak * factor(step) == pytest.approx(rate, rel=1e-9)
