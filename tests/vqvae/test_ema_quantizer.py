"""The EMA quantizer against closed forms: moving averages, k-means start, revival, several ranks.

Shapes: N vectors, D codebook_dim, K codes. Dense N x K forms are the references here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cogview_pl.vqvae.quantizer import EMAQuantizer
from tests.make_models import make_quantizer

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
    return make_quantizer("ema", **{"kmeans_iters": 0, "dead_threshold": 0, **settings})


# Moving averages


def test_ema_update_against_the_dense_formulas():
    torch.manual_seed(0)
    codebook_size, decay, eps = 10, 0.9, 1e-3
    quantizer = plain_ema(codebook_size=codebook_size, codebook_dim=4, decay=decay).train()
    quantizer.eps = eps
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
    quantizer = make_quantizer("ema", codebook_size=30, codebook_dim=4, kmeans_iters=10)
    assert not quantizer.initialised
    output = quantizer(as_latents(mixture(2000, centres_MD, weights)))
    assert quantizer.initialised
    to_nearest_code_M = torch.cdist(centres_MD, quantizer.codebook.T).min(1).values
    assert to_nearest_code_M.max() < 0.1
    assert output.commitment < 0.02**2 * 2
    assert output.usage == 1


def test_kmeans_runs_once():
    quantizer = make_quantizer("ema", codebook_size=8, codebook_dim=2, kmeans_iters=3, decay=0.999)
    quantizer(as_latents(torch.randn(100, 2)))
    before = quantizer.codebook.clone()
    quantizer(as_latents(torch.randn(100, 2) + 100))
    assert (quantizer.codebook - before).abs().max() < 20


def test_kmeans_with_fewer_vectors_than_codes():
    quantizer = make_quantizer("ema", codebook_size=32, codebook_dim=3, kmeans_iters=2)
    output = quantizer(as_latents(torch.randn(10, 3)))
    assert output.commitment < 1e-10
    assert torch.isfinite(quantizer.codebook).all()


def test_kmeans_with_equal_vectors():
    quantizer = make_quantizer("ema", codebook_size=4, codebook_dim=3, kmeans_iters=2)
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
    quantizer = make_quantizer(
        "ema", codebook_size=40, codebook_dim=4, decay=0.9, kmeans_iters=0, dead_threshold=0.1, revive_every=5
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
    quantizer = make_quantizer(
        "ema", codebook_size=16, codebook_dim=3, kmeans_iters=0, dead_threshold=0.1, revive_every=1
    )
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
        quantizer = make_quantizer(
            "ema", codebook_size=16, codebook_dim=3, kmeans_iters=0, dead_threshold=0.1, revive_every=revive_every
        )
        collapse_to_one_giant(quantizer)
        outputs = [quantizer(as_latents(torch.randn(50, 3))) for _ in range(3)]
        assert [int(output.revived) for output in outputs] == expected
        assert all(output.dead == 15 for output in outputs)


def test_state_dict_resumes_exactly():
    torch.manual_seed(0)
    settings = {"codebook_size": 16, "codebook_dim": 3, "decay": 0.7, "kmeans_iters": 2, "revive_every": 3}
    batches = [as_latents(torch.randn(40, 3) + i) for i in range(8)]
    straight = make_quantizer("ema", **settings)
    for batch in batches[:4]:
        straight(batch)
    state = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    random_state = torch.get_rng_state()
    for batch in batches[4:]:
        straight(batch)
    resumed = make_quantizer("ema", **settings)
    resumed.load_state_dict(state)
    torch.set_rng_state(random_state)
    for batch in batches[4:]:
        resumed(batch)
    assert straight.revived_total > state["revived_total"]
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


# Several ranks

RANKED = ("ema", "learned")
"""Quantizers whose upkeep, by the same random numbers, is the same on several ranks."""


def upkeep_after_batches(kind: str, batches: list[torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    upkeep = {"decay": 0.6, "kmeans_iters": 3, "dead_threshold": 0.1, "revive_every": 2}
    quantizer = make_quantizer(kind, codebook_size=12, codebook_dim=3, **upkeep)
    torch.manual_seed(seed)
    for batch in batches:
        output = quantizer(as_latents(batch))
    joined = {"usage": output.usage, "perplexity": output.perplexity} if kind == "ema" else {}
    return {**quantizer.state_dict(), **joined}


def drifting_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 3, generator=generator) + i for i in range(7)]


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for split in (44, 64):  # shares of different size, with another seed on each rank; at last one has nothing
        rows = slice(0, split) if rank == 0 else slice(split, 64)
        for kind in RANKED:
            state = upkeep_after_batches(kind, [batch[rows] for batch in drifting_batches()], seed=5 + rank)
            torch.save(state, f"{folder}/{rank}_{split}_{kind}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.ddp
def test_ranks_agree_with_each_other_and_with_one_process(tmp_path: Path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    for kind in RANKED:
        single = upkeep_after_batches(kind, drifting_batches(), seed=5)
        assert single["revived_total"] > 0
        for split in (44, 64):
            ranks = [torch.load(tmp_path / f"{rank}_{split}_{kind}.pt", weights_only=True) for rank in range(2)]
            for name, expected in single.items():
                assert torch.equal(ranks[0][name], ranks[1][name]), (kind, name)
                torch.testing.assert_close(ranks[0][name], expected)
