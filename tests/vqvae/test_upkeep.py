"""Quantizers by hand-made examples: how an EMA codebook starts, when codes die, what revival sets, settings.

Shapes: N vectors, D codebook_dim, K codes.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.vqvae.quantizer import EMAQuantizer
from cogview_pl.vqvae.quantizer_registry import build_quantizer
from tests.composed import composed
from tests.make_models import make_quantizer


def as_latents(x_ND: Tensor) -> Tensor:
    """Vectors as a one-row grid `(1, D, 1, N)`."""
    return x_ND.T[None, :, None, :]


def state_of(quantizer: EMAQuantizer) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """Cluster sizes `(K,)`, averages `(K, D)` and codes `(K, D)`."""
    return quantizer.cluster_size.tolist(), quantizer.embed_avg.T.tolist(), quantizer.codebook.T.tolist()


def test_without_kmeans_every_code_starts_as_one_vector() -> None:
    quantizer = make_quantizer("ema", codebook_size=6, codebook_dim=3, kmeans_iters=0)
    assert quantizer.cluster_size.tolist() == [1.0] * 6
    assert torch.equal(quantizer.embed_avg, quantizer.codebook)
    assert quantizer.initialised
    assert (quantizer.updates, quantizer.revived_total) == (0, 0)


def test_first_update_without_kmeans_by_hand() -> None:
    quantizer = make_quantizer("ema", codebook_size=2, codebook_dim=1, kmeans_iters=0, decay=0.5, dead_threshold=0)
    quantizer.codebook.copy_(torch.tensor([[0.0, 10.0]]))
    quantizer.embed_avg.copy_(quantizer.codebook)
    quantizer(as_latents(torch.tensor([[2.0], [4.0]])))
    assert quantizer.cluster_size.tolist() == [1.5, 0.5]  # half of 1, and half of 2 and of 0 vectors
    assert quantizer.embed_avg.tolist() == [[3.0, 5.0]]
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[2.0, 10.0]]), rtol=1e-4, atol=0)
    assert quantizer.updates == 1


def test_kmeans_sets_sizes_and_averages_of_the_batch() -> None:
    # Then an update by the same vectors changes nothing: sizes are those of the clusters, averages their sums.
    torch.manual_seed(0)
    quantizer = make_quantizer("ema", codebook_size=2, codebook_dim=2, kmeans_iters=5, decay=0.5, dead_threshold=0)
    assert not quantizer.initialised
    quantizer(as_latents(torch.tensor([[0.0, 0], [0, 2], [10, 0], [10, 2], [10, 4]])))
    assert quantizer.initialised
    sizes, averages, codes = state_of(quantizer)
    left = int(codes[0][0] > codes[1][0])
    assert (sizes[left], sizes[1 - left]) == (2.0, 3.0)
    assert (averages[left], averages[1 - left]) == ([0.0, 2.0], [30.0, 6.0])
    torch.testing.assert_close(torch.tensor([codes[left], codes[1 - left]]), torch.tensor([[0.0, 1], [10, 2]]))


def test_a_centre_without_vectors_starts_as_one_vector() -> None:
    quantizer = make_quantizer("ema", codebook_size=3, codebook_dim=2, kmeans_iters=2, decay=0.5, dead_threshold=0)
    quantizer(as_latents(torch.full((10, 2), 7.0)))
    assert quantizer.cluster_size.tolist() == [10.0, 0.5, 0.5]  # 10, 1, 1, and then an update by 10, 0, 0
    torch.testing.assert_close(quantizer.embed_avg, 7.0 * torch.tensor([10.0, 0.5, 0.5]).expand(2, 3))
    torch.testing.assert_close(quantizer.codebook, torch.full((2, 3), 7.0), rtol=1e-4, atol=0)


def test_kmeans_waits_for_training() -> None:
    quantizer = make_quantizer("ema", codebook_size=3, codebook_dim=2).eval()
    before = quantizer.codebook.clone()
    quantizer(as_latents(torch.randn(20, 2)))
    assert not quantizer.initialised
    assert torch.equal(quantizer.codebook, before)


def one_code_for_all(**settings: Any) -> EMAQuantizer:
    """Four codes, of which vectors at 0 take the first."""
    quantizer = make_quantizer("ema", codebook_size=4, codebook_dim=1, kmeans_iters=0, decay=0.5, **settings)
    quantizer.codebook.copy_(torch.tensor([[0.0, 10, 20, 30]]))
    quantizer.embed_avg.copy_(quantizer.codebook)
    return quantizer


def test_an_unused_code_is_dead_below_the_share_of_the_mean() -> None:
    # Four vectors a step keep the mean size at 1; what is unused has 1/2, 1/4, 1/8 (not below), 1/16.
    quantizer = one_code_for_all(dead_threshold=0.125, revive_every=0)
    outputs = [quantizer(as_latents(torch.zeros(4, 1))) for _ in range(4)]
    assert [int(output.dead) for output in outputs] == [0, 0, 0, 3]
    assert quantizer.cluster_size.tolist() == [3.8125, 0.0625, 0.0625, 0.0625]
    quantizer.eval()
    assert quantizer(as_latents(torch.zeros(4, 1))).dead == 3
    assert quantizer.updates == 4


def test_a_revived_code_gets_the_mean_size_and_a_vector_of_the_batch() -> None:
    quantizer = one_code_for_all(dead_threshold=0.3, revive_every=2)
    outputs = [quantizer(as_latents(torch.full((4, 1), value))) for value in (0.0, 2.0)]
    assert [int(output.revived) for output in outputs] == [0, 3]
    assert quantizer.revived_total == 3
    assert quantizer.cluster_size.tolist() == [3.25, 1.0, 1.0, 1.0]
    assert quantizer.codebook[0, 1:].tolist() == quantizer.embed_avg[0, 1:].tolist() == [2.0, 2.0, 2.0]
    assert quantizer.embed_avg[0, 0] == 4.0  # half of four vectors at 2


@pytest.mark.parametrize("kind", ["learned", "gumbel", "fixed"])
def test_without_averages_the_codes_that_a_batch_leaves_out_are_dead(kind: str) -> None:
    quantizer = make_quantizer(kind, codebook_size=8, codebook_dim=2).eval()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.arange(8.0).expand(2, 8))
        output = quantizer(as_latents(torch.tensor([[1.0, 1], [6, 6], [1, 1]])))
    assert output.codes.flatten().tolist() == [1, 6, 1]
    assert (output.dead, output.revived, output.usage) == (6, 0, 0.25)
    assert output.commitment == 0


def test_gumbel_in_evaluation_reports_the_divergence() -> None:
    quantizer = make_quantizer("gumbel", codebook_size=3, codebook_dim=1, kl_weight=0.5).eval()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 1.0, 2.0]]))
    x_ND = torch.tensor([[0.0], [1.0]])
    q_NK = (-torch.tensor([[0.0, 1, 4], [1, 0, 1]])).softmax(1)
    expected = 0.5 * (q_NK * (3 * q_NK).log()).sum(1).mean()
    torch.testing.assert_close(quantizer(as_latents(x_ND)).loss.detach(), expected)


def test_temperature_before_the_start_is_that_of_the_start() -> None:
    quantizer = make_quantizer("gumbel", codebook_size=4, codebook_dim=2, temperature_start=2.0, temperature_end=0.5)
    assert quantizer.temperature == 2.0
    quantizer.set_progress(0.5)
    assert quantizer.temperature == 1.0
    quantizer.set_progress(-1.0)
    assert quantizer.temperature == 2.0


@pytest.mark.parametrize("kind", ["ema", "learned", "gumbel", "fixed", "cosine", "fsq"])
def test_a_configuration_names_every_argument_of_its_quantizer(kind: str) -> None:
    options = vars(composed("task=vqvae", f"image_tokenizer/quantizer={kind}").image_tokenizer.quantizer)
    quantizer = build_quantizer(options, codebook_size=512, codebook_dim=2)
    assert f"{type(quantizer).__module__}.{type(quantizer).__name__}" == options.pop("_target_")
    holders = list(quantizer.modules())
    assert all(any(getattr(part, name, None) == value for part in holders) for name, value in options.items())
    named = set(inspect.signature(type(quantizer)).parameters)
    assert named == {"codebook_size", "codebook_dim", *options}


@pytest.mark.parametrize(
    ("kind", "key", "value", "wanted"),
    [
        ("ema", "decay", -0.01, r"in \[0, 1\)"),
        ("ema", "decay", 1.0, r"in \[0, 1\)"),
        ("ema", "commitment_weight", -0.01, "0 or more"),
        ("ema", "kmeans_iters", -1, r"0 \(off\) or more"),
        ("ema", "dead_threshold", -0.01, r"in \[0, 0.5\)"),
        ("ema", "dead_threshold", 0.5, r"in \[0, 0.5\)"),
        ("ema", "revive_every", -1, r"0 \(off\) or more"),
        ("learned", "commitment_weight", -0.01, "0 or more"),
        ("fixed", "commitment_weight", -0.01, "0 or more"),
        ("gumbel", "kl_weight", -0.01, "0 or more"),
        ("gumbel", "temperature_start", 0.0, "greater than 0"),
        ("gumbel", "temperature_end", 0.0, "greater than 0"),
    ],
)
def test_refused_settings(kind: str, key: str, value: float, wanted: str) -> None:
    with pytest.raises(UserError, match=rf"image_tokenizer\.quantizer\.{key} is {value}: it must be {wanted}"):
        make_quantizer(kind, codebook_size=4, codebook_dim=2, **{key: value})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ema", {"decay": 0, "commitment_weight": 0, "kmeans_iters": 0, "dead_threshold": 0, "revive_every": 0}),
        ("ema", {"decay": 0.999, "dead_threshold": 0.49, "kmeans_iters": 1, "revive_every": 1}),
        ("learned", {"commitment_weight": 0}),
        ("fixed", {"commitment_weight": 0}),
        ("gumbel", {"kl_weight": 0, "temperature_start": 0.01, "temperature_end": 0.01}),
    ],
)
def test_settings_at_their_ends(kind: str, settings: dict[str, float]) -> None:
    quantizer = make_quantizer(kind, codebook_size=4, codebook_dim=2, **settings)
    assert all(getattr(quantizer, key) == value for key, value in settings.items())
