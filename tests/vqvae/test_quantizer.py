"""Quantizers against closed forms, and the invariants of codebook upkeep.

Shapes: N vectors, D codebook_dim, K codes. Dense N x K forms are the references here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogview_pl.errors import UserError
from cogview_pl.vqvae.quantizer import EMAQuantizer, FixedQuantizer, GumbelQuantizer, LearnedQuantizer, make_quantizer

STATISTICS = ("codebook", "cluster_size", "embed_avg")


def as_latents(x_ND: torch.Tensor) -> torch.Tensor:
    """Vectors as a one-row grid `(1, D, 1, N)`."""
    return x_ND.T[None, :, None, :]


def as_vectors(latents: torch.Tensor) -> torch.Tensor:
    return latents[0, :, 0, :].T


def mixture(num_vectors: int, centres_MD: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Tight gaussian clusters around the centres."""
    weights = torch.ones(len(centres_MD)) if weights is None else weights
    choice = torch.multinomial(weights, num_vectors, replacement=True)
    return centres_MD[choice] + 0.02 * torch.randn(num_vectors, centres_MD.shape[1])


def plain_ema(**settings) -> EMAQuantizer:
    return EMAQuantizer(**{"kmeans_iters": 0, "dead_threshold": 0, **settings})


# Lookup


@pytest.mark.parametrize(("num_vectors", "codebook_size"), [(1, 1), (7, 5), (1100, 8192), (600, 10000)])
def test_lookup_finds_the_nearest_code(num_vectors, codebook_size):
    torch.manual_seed(0)
    quantizer = FixedQuantizer(codebook_size=codebook_size, codebook_dim=6)
    x_ND = 0.05 * torch.randn(num_vectors, 6)
    codes_N = quantizer.lookup(x_ND)
    distance_NK = (x_ND[:, None].double() - quantizer.codebook.T.double()).square().sum(-1)
    chosen_N = distance_NK.gather(1, codes_N[:, None])[:, 0]
    torch.testing.assert_close(chosen_N, distance_NK.min(1).values, atol=1e-7, rtol=0)
    assert torch.equal(quantizer.embed(codes_N), quantizer.codebook.T[codes_N])


def test_lookup_takes_the_first_of_equal_codes():
    quantizer = FixedQuantizer(codebook_size=6, codebook_dim=2)
    quantizer.codebook.copy_(torch.tensor([[9.0, 1, 1, 0, 1, 9], [9, 1, 1, 0, 1, 9]]))
    assert quantizer.lookup(torch.tensor([[1.0, 1.1], [8.0, 8.0], [0.5, 0.5]])).tolist() == [1, 0, 1]


@pytest.mark.parametrize("kind", ["ema", "learned", "gumbel", "fixed"])
def test_autocast_and_half_precision_latents_keep_the_arithmetic_in_float32(kind):
    latents = 0.2 * torch.randn(4, 8, 16, 16).bfloat16()

    def quantize(latents: torch.Tensor):
        torch.manual_seed(0)
        quantizer = make_quantizer(kind, codebook_size=512, codebook_dim=8).train()
        return quantizer, quantizer(latents)

    expected_quantizer, expected = quantize(latents.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantizer, output = quantize(latents)
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.quantized, expected.quantized.bfloat16())
    for name, tensor in expected_quantizer.state_dict().items():
        assert torch.equal(quantizer.state_dict()[name], tensor), name


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def test_memory_does_not_grow_with_vectors_times_codes():
    quantizer = plain_ema(codebook_size=8192, codebook_dim=64).train()
    latents = torch.randn(16, 64, 32, 32)
    with LargestTensor() as largest:
        quantizer(latents)
    assert latents.numel() <= largest.numel <= 8 * 1024 * 1024 < 16384 * 8192


def test_gumbel_memory_does_not_grow_with_vectors_times_codes():
    quantizer = GumbelQuantizer(codebook_size=2048, codebook_dim=4).train()
    latents = torch.randn(1, 4, 64, 128, requires_grad=True)
    with LargestTensor() as largest:
        output = quantizer(latents)
        (output.quantized.sum() + output.loss).backward()
    assert largest.numel <= 8 * 1024 * 1024 < 8192 * 2048


# Results common to all


def test_straight_through_and_commitment_gradient():
    torch.manual_seed(0)
    beta = 0.4
    for kind in ("ema", "fixed"):
        quantizer = make_quantizer(kind, codebook_size=12, codebook_dim=3, commitment_weight=beta)
        latents = torch.randn(2, 3, 4, 5, requires_grad=True)
        output = quantizer.eval()(latents)
        vectors = quantizer.embed(output.codes).permute(0, 3, 1, 2)
        assert torch.equal(output.quantized, vectors)
        cotangent = torch.randn_like(latents)
        (through,) = torch.autograd.grad(output.quantized, latents, cotangent, retain_graph=True)
        assert torch.equal(through, cotangent)
        (pull,) = torch.autograd.grad(output.loss, latents)
        torch.testing.assert_close(pull, beta * 2 * (latents - vectors).detach() / latents.numel())
        torch.testing.assert_close(output.commitment, (latents - vectors).detach().square().mean())


@pytest.mark.parametrize("kind", ["ema", "learned", "gumbel", "fixed"])
@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_a_batch(kind, training):
    quantizer = make_quantizer(kind, codebook_size=8, codebook_dim=2).train(training)
    output = quantizer(torch.randn(3, 2, 4, 4))
    frequency_K = torch.bincount(output.codes.flatten(), minlength=8) / 48
    used_K = frequency_K[frequency_K > 0]
    assert output.usage.item() == pytest.approx(len(used_K) / 8)
    assert output.perplexity.item() == pytest.approx((-(used_K * used_K.log()).sum()).exp().item(), rel=1e-5)
    assert output.quantized.shape == (3, 2, 4, 4)
    assert output.codes.shape == (3, 4, 4)
    assert all(value.ndim == 0 for value in output[2:])


@pytest.mark.parametrize("kind", ["ema", "learned", "gumbel", "fixed"])
def test_evaluation_is_deterministic_nearest_code(kind):
    quantizer = make_quantizer(kind, codebook_size=16, codebook_dim=4).eval()
    latents = torch.randn(2, 4, 3, 3)
    output = quantizer(latents)
    assert torch.equal(output.codes.flatten(), quantizer.lookup(latents.permute(0, 2, 3, 1).flatten(0, 2)))
    assert torch.equal(output.quantized.permute(0, 2, 3, 1), quantizer.embed(output.codes))
    assert torch.equal(quantizer(latents).quantized, output.quantized)


# Moving averages


def test_ema_update_against_the_dense_formulas():
    torch.manual_seed(0)
    codebook_size, decay, eps = 10, 0.9, 1e-3
    quantizer = plain_ema(codebook_size=codebook_size, codebook_dim=4, decay=decay, eps=eps).train()
    embed, cluster_size, embed_avg = (getattr(quantizer, name).clone() for name in STATISTICS)
    for _ in range(3):
        x_ND = torch.randn(50, 4)
        output = quantizer(as_latents(x_ND))
        one_hot_NK = torch.cdist(x_ND, embed.T).argmin(1)[:, None] == torch.arange(codebook_size)
        one_hot_NK = one_hot_NK.float()
        # The step returns the code words from before its own update.
        torch.testing.assert_close(as_vectors(output.quantized), one_hot_NK @ embed.T)
        cluster_size = decay * cluster_size + (1 - decay) * one_hot_NK.sum(0)
        embed_avg = decay * embed_avg + (1 - decay) * x_ND.T @ one_hot_NK
        n = cluster_size.sum()
        embed = embed_avg / ((cluster_size + eps) / (n + codebook_size * eps) * n)
        for name, expected in zip(STATISTICS, (embed, cluster_size, embed_avg), strict=True):
            torch.testing.assert_close(getattr(quantizer, name), expected)
        assert output.revived == 0


def test_cold_start_leaves_unused_codes_in_place():
    quantizer = plain_ema(codebook_size=64, codebook_dim=4).train()
    start = quantizer.codebook.clone()
    x_ND = 0.01 * torch.randn(100, 4) + start[:, 5]
    for _ in range(3):
        codes = quantizer(as_latents(x_ND)).codes
    unused_K = torch.bincount(codes.flatten(), minlength=64) == 0
    assert unused_K.sum() > 50
    torch.testing.assert_close(quantizer.codebook[:, unused_K], start[:, unused_K], rtol=1e-3, atol=1e-3)


# k-means start


def test_kmeans_covers_an_unbalanced_mixture():
    torch.manual_seed(0)
    centres_MD = 3 * torch.randn(20, 4)
    weights = torch.ones(20)
    weights[0] = 60  # three quarters of all vectors
    quantizer = EMAQuantizer(codebook_size=30, codebook_dim=4, kmeans_iters=10)
    assert not quantizer.initialised
    output = quantizer(as_latents(mixture(2000, centres_MD, weights)))
    assert quantizer.initialised
    to_nearest_code_M = torch.cdist(centres_MD, quantizer.codebook.T).min(1).values
    assert to_nearest_code_M.max() < 0.1
    assert output.commitment < 0.02**2 * 2
    assert output.usage == 1


def test_kmeans_runs_once():
    quantizer = EMAQuantizer(codebook_size=8, codebook_dim=2, kmeans_iters=3, decay=0.999)
    quantizer(as_latents(torch.randn(100, 2)))
    before = quantizer.codebook.clone()
    quantizer(as_latents(torch.randn(100, 2) + 100))
    assert (quantizer.codebook - before).abs().max() < 20


def test_kmeans_with_fewer_vectors_than_codes():
    quantizer = EMAQuantizer(codebook_size=32, codebook_dim=3, kmeans_iters=2)
    output = quantizer(as_latents(torch.randn(10, 3)))
    assert output.commitment < 1e-10
    assert torch.isfinite(quantizer.codebook).all()


def test_kmeans_with_equal_vectors():
    quantizer = EMAQuantizer(codebook_size=4, codebook_dim=3, kmeans_iters=2)
    quantizer(as_latents(torch.ones(10, 3)))
    torch.testing.assert_close(quantizer.codebook, torch.ones(3, 4), rtol=1e-4, atol=0)


# Revival


def collapse_to_equal_codes(quantizer: EMAQuantizer) -> None:
    quantizer.codebook.fill_(0.1)
    quantizer.embed_avg.fill_(0.1)


def collapse_to_one_giant(quantizer: EMAQuantizer) -> None:
    quantizer.codebook.fill_(1000.0)
    quantizer.codebook[:, 3] = 0.0
    quantizer.cluster_size.fill_(1e-4)
    quantizer.cluster_size[3] = 5000.0
    quantizer.embed_avg.copy_(quantizer.codebook * quantizer.cluster_size)


@pytest.mark.parametrize("collapse", [collapse_to_equal_codes, collapse_to_one_giant])
def test_revival_mends_a_collapsed_codebook(collapse):
    torch.manual_seed(0)
    centres_MD = 2 * torch.randn(40, 4)
    quantizer = EMAQuantizer(
        codebook_size=40, codebook_dim=4, decay=0.9, kmeans_iters=0, dead_threshold=0.1, revive_every=5
    )
    collapse(quantizer)
    first = quantizer(as_latents(mixture(1000, centres_MD)))
    assert first.usage <= 1 / 40
    total = 0
    for _ in range(120):
        output = quantizer(as_latents(mixture(1000, centres_MD)))
        total += int(output.revived)
    assert output.usage > 0.9
    assert output.dead <= 4
    assert quantizer.codebook.abs().max() < centres_MD.abs().max() + 1
    assert total == quantizer.revived_total >= 30
    assert quantizer.eval()(as_latents(mixture(1000, centres_MD))).usage > 0.9


def test_revived_codes_are_current_vectors_and_stay_alive():
    torch.manual_seed(0)
    quantizer = EMAQuantizer(codebook_size=16, codebook_dim=3, kmeans_iters=0, dead_threshold=0.1, revive_every=1)
    collapse_to_one_giant(quantizer)
    x_ND = torch.randn(200, 3)
    output = quantizer(as_latents(x_ND))
    assert output.revived == output.dead == 15
    revived_KD = torch.cat([quantizer.codebook[:, :3], quantizer.codebook[:, 4:]], dim=1).T
    assert torch.cdist(revived_KD, x_ND).min(1).values.max() < 1e-5
    assert len(revived_KD.unique(dim=0)) == 15
    before = revived_KD.clone()
    for _ in range(3):
        # All vectors sit on the giant, so the revived codes win none.
        output = quantizer(as_latents(quantizer.codebook[:, 3].expand(200, 3)))
        assert output.revived == output.dead == 0
    after_KD = torch.cat([quantizer.codebook[:, :3], quantizer.codebook[:, 4:]], dim=1).T
    torch.testing.assert_close(after_KD, before, rtol=1e-4, atol=1e-4)


def test_revival_happens_every_so_many_updates_and_can_be_off():
    for revive_every, expected in ((3, [0, 0, 15]), (0, [0, 0, 0])):
        quantizer = EMAQuantizer(
            codebook_size=16, codebook_dim=3, kmeans_iters=0, dead_threshold=0.1, revive_every=revive_every
        )
        collapse_to_one_giant(quantizer)
        outputs = [quantizer(as_latents(torch.randn(50, 3))) for _ in range(3)]
        assert [int(output.revived) for output in outputs] == expected
        assert all(output.dead == 15 for output in outputs)


def test_state_dict_resumes_exactly():
    torch.manual_seed(0)
    settings = {"codebook_size": 16, "codebook_dim": 3, "decay": 0.7, "kmeans_iters": 2, "revive_every": 3}
    batches = [as_latents(torch.randn(40, 3) + i) for i in range(8)]
    straight = EMAQuantizer(**settings)
    for batch in batches[:4]:
        straight(batch)
    state = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    random_state = torch.get_rng_state()
    for batch in batches[4:]:
        straight(batch)
    resumed = EMAQuantizer(**settings)
    resumed.load_state_dict(state)
    torch.set_rng_state(random_state)
    for batch in batches[4:]:
        resumed(batch)
    assert straight.revived_total > state["revived_total"]
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


# Several ranks


def upkeep_after_batches(batches: list[torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    quantizer = EMAQuantizer(codebook_size=12, codebook_dim=3, decay=0.6, kmeans_iters=3, revive_every=2)
    torch.manual_seed(seed)
    for batch in batches:
        output = quantizer(as_latents(batch))
    return {**quantizer.state_dict(), "usage": output.usage, "perplexity": output.perplexity}


def drifting_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 3, generator=generator) + i for i in range(7)]


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for split in (44, 64):  # shares of different size, with another seed on each rank; at last one has nothing
        rows = slice(0, split) if rank == 0 else slice(split, 64)
        state = upkeep_after_batches([batch[rows] for batch in drifting_batches()], seed=5 + rank)
        torch.save(state, f"{folder}/{rank}_{split}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_ranks_agree_with_each_other_and_with_one_process(tmp_path: Path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    single = upkeep_after_batches(drifting_batches(), seed=5)
    assert single["revived_total"] > 0
    for split in (44, 64):
        ranks = [torch.load(tmp_path / f"{rank}_{split}.pt", weights_only=True) for rank in range(2)]
        for name, expected in single.items():
            assert torch.equal(ranks[0][name], ranks[1][name]), name
            torch.testing.assert_close(ranks[0][name], expected)


# Codebook by gradient


def test_learned_codebook_gradient():
    torch.manual_seed(0)
    beta = 0.3
    quantizer = LearnedQuantizer(codebook_size=6, codebook_dim=3, commitment_weight=beta)
    x_ND = torch.randn(20, 3, requires_grad=True)
    output = quantizer(as_latents(x_ND))
    output.loss.backward(retain_graph=True)
    one_hot_NK = torch.nn.functional.one_hot(output.codes.flatten(), 6).float()
    residual_ND = (one_hot_NK @ quantizer.codebook.T - x_ND).detach()
    torch.testing.assert_close(quantizer.codebook.grad, 2 * residual_ND.T @ one_hot_NK / x_ND.numel())
    torch.testing.assert_close(x_ND.grad, -2 * beta * residual_ND / x_ND.numel())
    torch.testing.assert_close(output.loss, (1 + beta) * residual_ND.square().mean())
    # The reconstruction loss reaches the encoder only.
    quantizer.codebook.grad = None
    (through,) = torch.autograd.grad(output.quantized.sum(), x_ND)
    assert torch.equal(through, torch.ones_like(x_ND))


def test_fixed_codebook_stays():
    quantizer = FixedQuantizer(codebook_size=6, codebook_dim=3)
    before = quantizer.codebook.clone()
    for _ in range(3):
        x_ND = torch.randn(20, 3, requires_grad=True)
        output = quantizer(as_latents(x_ND))
        (output.quantized.sum() + output.loss).backward()
        assert x_ND.grad is not None
    assert torch.equal(quantizer.codebook, before)
    assert not list(quantizer.parameters())


# Gumbel


def gumbel_reference(x_ND, codebook_DK, exponential_NK, temperature, cotangent_ND, hard):
    """Result, codes, divergence; gradients of `sum(result * cotangent)` and of the divergence, by hand."""
    code_KD = codebook_DK.T
    difference_NKD = x_ND[:, None] - code_KD
    distance_NK = difference_NKD.square().sum(-1)
    y_NK = ((-distance_NK - exponential_NK.log()) / temperature).softmax(1)
    one_hot_NK = torch.nn.functional.one_hot(y_NK.argmax(1), len(code_KD)).to(y_NK)
    chosen_NK = one_hot_NK if hard else y_NK

    def through_softmax(p_NK, grad_p_NK):
        return p_NK * (grad_p_NK - (p_NK * grad_p_NK).sum(1, keepdim=True))

    def through_distance(grad_distance_NK):
        grad_NKD = 2 * grad_distance_NK[..., None] * difference_NKD
        return grad_NKD.sum(1), -grad_NKD.sum(0)

    grad_x, grad_code = through_distance(-through_softmax(y_NK, cotangent_ND @ code_KD.T) / temperature)
    grad_code = grad_code + chosen_NK.T @ cotangent_ND
    q_NK = (-distance_NK).softmax(1)
    ratio_NK = q_NK * len(code_KD) + 1e-20
    divergence = (q_NK * ratio_NK.log()).sum(1).mean()
    grad_kl_x, grad_kl_code = through_distance(-through_softmax(q_NK, ratio_NK.log() + 1) / len(x_ND))
    return chosen_NK @ code_KD, y_NK.argmax(1), divergence, grad_x, grad_code.T, grad_kl_x, grad_kl_code.T


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_gumbel_against_closed_form(hard, temperature):
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(
        codebook_size=7, codebook_dim=3, hard=hard, kl_weight=0.5, temperature_start=temperature
    ).train()
    x_ND, cotangent_ND = 0.5 * torch.randn(11, 3), torch.randn(11, 3)
    state = torch.get_rng_state()
    exponential_NK = torch.empty(11, 7).exponential_()
    expected = gumbel_reference(x_ND, quantizer.codebook.detach(), exponential_NK, temperature, cotangent_ND, hard)
    torch.set_rng_state(state)
    x_ND.requires_grad_()
    output = quantizer(as_latents(x_ND))
    both = [x_ND, quantizer.codebook]
    result = as_vectors(output.quantized)
    gradients = torch.autograd.grad(result, both, cotangent_ND, retain_graph=True)
    kl_gradients = torch.autograd.grad(output.loss / 0.5, both)
    actual = (result, output.codes.flatten(), output.loss / 0.5, *gradients, *kl_gradients)
    for value, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().max() > 0.01


def test_gumbel_draws_codes_with_softmax_probability():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(codebook_size=5, codebook_dim=2, temperature_start=0.5).train()
    x_D = torch.randn(2)
    codes = quantizer(as_latents(x_D.expand(40000, 2))).codes
    frequency_K = torch.bincount(codes.flatten(), minlength=5) / 40000
    # The largest noisy score is a draw from softmax(-distance), whatever the temperature.
    probability_K = (-(x_D[:, None] - quantizer.codebook.detach()).square().sum(0)).softmax(0)
    torch.testing.assert_close(frequency_K, probability_K, atol=0.01, rtol=0)


def test_temperature_falls_exponentially_and_is_saved():
    quantizer = GumbelQuantizer(codebook_size=4, codebook_dim=2, temperature_start=2.0, temperature_end=0.02)
    for fraction, expected in ((0.0, 2.0), (0.5, 0.2), (1.0, 0.02), (1.5, 0.02)):
        quantizer.set_progress(fraction)
        assert quantizer.temperature.item() == pytest.approx(expected)
    other = GumbelQuantizer(codebook_size=4, codebook_dim=2)
    other.load_state_dict(quantizer.state_dict())
    assert other.temperature.item() == pytest.approx(0.02)


def test_cold_gumbel_mixture_is_one_code():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(codebook_size=8, codebook_dim=2, hard=False, temperature_end=1e-6).train()
    quantizer.set_progress(1.0)
    output = quantizer(torch.randn(1, 2, 5, 5))
    torch.testing.assert_close(output.quantized.permute(0, 2, 3, 1), quantizer.embed(output.codes))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ema", {"decay": 1.0}),
        ("ema", {"dead_threshold": 0.5}),
        ("ema", {"kmeans_iters": -1}),
        ("ema", {"revive_every": -1}),
        ("learned", {"commitment_weight": -0.1}),
        ("gumbel", {"temperature_end": 0.0}),
    ],
)
def test_bad_settings_name_the_key(kind, settings):
    (key,) = settings
    with pytest.raises(UserError, match=rf"image_tokenizer\.quantizer\.{key} is {settings[key]}: it must be"):
        make_quantizer(kind, codebook_size=4, codebook_dim=2, **settings)
