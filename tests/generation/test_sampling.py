"""From logits to a token: temperature, top-k, top-p, and the frequencies of samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.generation.config import Algorithm, Engine, Sampling
from cogview_pl.generation.sampling import guide, probabilities, sample

from ..composed import composed

LAST_FP32 = 1 - 2**-24
"""The largest fp32 number below 1."""


def logits_of(*chances: float) -> Tensor:
    return torch.tensor([chances]).log()


def random_logits(rows: int = 6, columns: int = 50) -> Tensor:
    return 3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


class TestTemperature:
    @pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}])
    def test_zero_takes_the_most_likely(self, filters: dict[str, float]) -> None:
        logits = random_logits()
        chances = probabilities(logits, Sampling(temperature=0, **filters))  # type: ignore[arg-type]
        assert (chances == torch.nn.functional.one_hot(logits.argmax(-1), 50)).all()
        for uniform in (0.0, 0.5, LAST_FP32):
            assert (sample(chances, torch.full((6,), uniform)) == logits.argmax(-1)).all()

    @pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
    def test_divides_the_logits(self, temperature: float) -> None:
        logits = random_logits()
        grown = (logits.double() / temperature).exp()
        found = probabilities(logits, Sampling(temperature=temperature))
        torch.testing.assert_close(found.double(), grown / grown.sum(-1, keepdim=True), atol=1e-6, rtol=1e-4)

    def test_zero_takes_the_first_of_equals(self) -> None:
        chances = probabilities(torch.tensor([[1.0, 4.0, 4.0], [2.0, 2.0, 1.0]]), Sampling(temperature=0))
        assert chances.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]

    @pytest.mark.parametrize("temperature", [1e-3, 1.0])
    def test_the_largest_logits_do_not_overflow(self, temperature: float) -> None:
        # The maximum is taken off before the division; twice a logit, or one over 1e-3, is out of the range of fp32.
        logits = torch.tensor([[2e38, 1e38, 2e38], [-2e38, -3e38, -3e38]])
        chances = probabilities(logits, Sampling(temperature=temperature))
        assert chances.tolist() == [[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]]

    def test_small_ones_approach_the_most_likely(self) -> None:
        logits = random_logits()
        torch.testing.assert_close(
            probabilities(logits, Sampling(temperature=1e-6)), probabilities(logits, Sampling(temperature=0))
        )


class TestTopK:
    @pytest.mark.parametrize("k", [1, 2, 10, 49])
    def test_keeps_the_k_most_likely(self, k: int) -> None:
        logits = random_logits()
        chances = probabilities(logits, Sampling(top_k=k))
        kept = chances > 0
        assert (kept.sum(-1) == k).all()
        assert kept.gather(-1, logits.topk(k).indices).all()
        expected = logits.softmax(-1) * kept
        torch.testing.assert_close(chances, expected / expected.sum(-1, keepdim=True))

    @pytest.mark.parametrize("k", [0, 50, 1000])
    def test_none_or_more_than_there_are_keeps_all(self, k: int) -> None:
        logits = random_logits()
        torch.testing.assert_close(probabilities(logits, Sampling(top_k=k)), logits.softmax(-1))

    def test_ties_at_the_threshold_stay(self) -> None:
        logits = torch.tensor([[1.0, 3.0, 1.0, 0.0, 1.0]])
        assert (probabilities(logits, Sampling(top_k=2)) > 0).tolist() == [[True, True, True, False, True]]
        assert (probabilities(logits, Sampling(top_k=1)) > 0).tolist() == [[False, True, False, False, False]]

    def test_equals_at_the_maximum_share(self) -> None:
        logits = torch.tensor([[5.0, 0.0, 5.0, -1.0]])
        for k in (1, 2):
            assert probabilities(logits, Sampling(top_k=k)).tolist() == [[0.5, 0.0, 0.5, 0.0]]

    def test_all_but_the_least_likely(self) -> None:
        logits = torch.tensor([[3.0, 1.0, 2.0]])
        assert (probabilities(logits, Sampling(top_k=2)) > 0).tolist() == [[True, False, True]]
        assert (probabilities(logits, Sampling(top_k=3)) > 0).tolist() == [[True, True, True]]

    def test_impossible_candidates_do_not_come_back(self) -> None:
        logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0]])
        for k in (0, 1, 2, 3, 4):
            assert probabilities(logits, Sampling(top_k=k)).tolist() == [[0.0, 0.5, 0.0, 0.5]]

    def test_counts_candidates_and_not_rows(self) -> None:
        # More rows than candidates, and k between the two.
        logits = random_logits(rows=9, columns=4)
        assert ((probabilities(logits, Sampling(top_k=2)) > 0).sum(-1) == 2).all()
        assert ((probabilities(logits, Sampling(top_k=6)) > 0).sum(-1) == 4).all()
        logits = random_logits(rows=2, columns=8)
        assert ((probabilities(logits, Sampling(top_k=3)) > 0).sum(-1) == 3).all()


class TestTopP:
    @pytest.mark.parametrize(
        ("p", "kept"),
        [
            (0.01, [False, True, False, False]),
            (0.39, [False, True, False, False]),
            (0.41, [False, True, False, True]),  # the one that passes p stays
            (0.69, [False, True, False, True]),
            (0.71, [True, True, False, True]),
            (0.89, [True, True, False, True]),
            (0.91, [True, True, True, True]),
            (1.0, [True, True, True, True]),
        ],
    )
    def test_keeps_the_most_likely_up_to_p(self, p: float, kept: list[bool]) -> None:
        logits = logits_of(0.2, 0.4, 0.1, 0.3)
        chances = probabilities(logits, Sampling(top_p=p))
        assert (chances > 0).tolist() == [kept]
        expected = torch.tensor([[0.2, 0.4, 0.1, 0.3]]) * torch.tensor([kept])
        torch.testing.assert_close(chances, expected / expected.sum())

    @pytest.mark.parametrize(("p", "kept"), [(0.25, 2), (0.5, 3), (0.75, 4)])
    def test_p_reached_exactly_is_not_passed(self, p: float, kept: int) -> None:
        # As in the original: the next candidate still stays. Quarters are exact in binary.
        assert (probabilities(torch.zeros(1, 4), Sampling(top_p=p)) > 0).sum() == kept

    def test_p_met_exactly_by_the_most_likely(self) -> None:
        # One half is exact; at p = 1/2 the two of a quarter are equal, and the first of them in the order stays.
        logits = torch.tensor([[0.0, 0.0, math.log(2)]])
        assert probabilities(logits, Sampling(top_p=0.49)).tolist() == [[0.0, 0.0, 1.0]]
        half = probabilities(logits, Sampling(top_p=0.5))
        assert half[0, 2] > 0.6 and (half > 0).sum() == 2

    def test_all_is_kept_where_rounded_sums_pass_1(self) -> None:
        logits = random_logits(columns=40_000)
        ordered = logits.softmax(-1).sort(-1, descending=True).values
        assert (ordered.cumsum(-1) - ordered).max() > 1  # by rounding
        assert (probabilities(logits, Sampling(top_k=0, top_p=1.0)) > 0).all()

    def test_rows_are_cut_by_themselves(self) -> None:
        logits = torch.cat([logits_of(0.2, 0.4, 0.1, 0.3), logits_of(0.9, 0.05, 0.03, 0.02), torch.zeros(1, 4)])
        kept = probabilities(logits, Sampling(top_p=0.6)) > 0
        assert kept[:2].tolist() == [[False, True, False, True], [True, False, False, False]]
        assert kept[2].sum() == 3

    def test_applies_to_what_top_k_left(self) -> None:
        # Of 0.4 and 0.3, renormalised to 0.571 and 0.429, the first alone reaches 0.5.
        chances = probabilities(logits_of(0.2, 0.4, 0.1, 0.3), Sampling(top_k=2, top_p=0.5))
        torch.testing.assert_close(chances, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))

    def test_applies_after_the_temperature(self) -> None:
        # At temperature 1/2 the chances are squared: 0.16 of 0.30 is 0.533.
        chances = probabilities(logits_of(0.2, 0.4, 0.1, 0.3), Sampling(temperature=0.5, top_p=0.53))
        torch.testing.assert_close(chances, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.0), Sampling(0.3, 5), Sampling(2.0, 0, 0.7), Sampling(1, 9, 0.9)]
)
def test_probabilities_sum_to_one_in_fp32(sampling: Sampling, dtype: torch.dtype) -> None:
    chances = probabilities(random_logits().to(dtype), sampling)
    assert chances.dtype == torch.float32
    assert (chances >= 0).all()
    torch.testing.assert_close(chances.sum(-1), torch.ones(6))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"temperature": math.nan},
        {"guidance": -0.5},
        {"guidance": math.inf},
        {"guidance": math.nan},
        {"temperature": -0.01},
        {"top_p": 1.01},
        {"guidance": -0.01},
        {"drafts": 0},
    ],
    ids=str,
)
def test_impossible_settings(settings: dict[str, float]) -> None:
    ((key, value),) = settings.items()
    with pytest.raises(UserError, match=rf"^sampler\.{key}={value} must be "):
        Sampling(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"temperature": 0.5}, {"top_k": 1}, {"top_p": 0.01}, {"guidance": 0}, {"drafts": 1}],
    ids=str,
)
def test_settings_at_their_ends(settings: dict[str, float]) -> None:
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    assert all(getattr(sampling, name) == value for name, value in settings.items())


def test_defaults_are_those_of_the_configuration() -> None:
    assert composed("task=generate").sampler == Sampling()
    assert Sampling() == Sampling(1.0, 200, 1.0, 1.0, Algorithm.sequential, 16, True, 64, Engine.auto)


def test_choices_may_be_given_by_their_names() -> None:
    assert Sampling(algorithm="jacobi") == Sampling(algorithm=Algorithm.jacobi)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^sampler\.algorithm=jacoby must be one of sequential, jacobi$"):
        Sampling(algorithm="jacoby")  # type: ignore[arg-type]
    assert Sampling(engine="torch") == Sampling(engine=Engine.torch)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^sampler\.engine=onnx must be one of auto, torch, compiled$"):
        Sampling(engine="onnx")  # type: ignore[arg-type]


@pytest.mark.parametrize(("guidance", "guided"), [(1, False), (1.0, False), (0, True), (0.5, True), (2, True)])
def test_guidance_other_than_1_is_guided(guidance: float, guided: bool) -> None:
    assert Sampling(guidance=guidance).guided is guided


def test_plain_keeps_the_filters() -> None:
    asked = Sampling(0.7, 5, 0.9, guidance=3.0, algorithm=Algorithm.jacobi, drafts=4, cuda_graphs=False)
    assert asked.plain() == Sampling(0.7, 5, 0.9, 1.0, Algorithm.sequential, 4, False)


def test_guidance_by_hand() -> None:
    conditional, unconditional = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    wanted = {0: [[1.0, 2.0]], 0.5: [[2.0, 1.5]], 1: [[3.0, 1.0]], 3: [[7.0, -1.0]]}
    for guidance, logits in wanted.items():
        assert guide(conditional, unconditional, guidance).tolist() == logits


class TestSample:
    SAMPLES = 200_000

    @pytest.mark.parametrize("scale", [1.0, 7.3])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_frequencies(self, seed: int, scale: float) -> None:
        chances = torch.tensor([0.3, 0.0, 0.2, 0.001, 0.15, 0.249, 0.1, 0.0])
        uniform = torch.rand(self.SAMPLES, generator=torch.Generator().manual_seed(seed))
        sampled = sample((scale * chances).expand(self.SAMPLES, -1), uniform)
        observed = torch.bincount(sampled, minlength=8).double()
        expected = self.SAMPLES * chances.double() / chances.double().sum()
        possible = expected > 0
        assert (observed[~possible] == 0).all()
        chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
        assert chi_square < 20.5  # 99.9 % quantile, 5 degrees of freedom

    def test_frequencies_of_filtered_logits(self) -> None:
        logits = random_logits(rows=1, columns=40)
        chances = probabilities(logits, Sampling(temperature=1.3, top_k=11))
        uniform = torch.rand(self.SAMPLES, generator=torch.Generator().manual_seed(0))
        sampled = sample(chances.expand(self.SAMPLES, -1), uniform)
        observed = torch.bincount(sampled, minlength=40).double()
        expected = self.SAMPLES * chances[0].double()
        possible = expected > 0
        assert (observed[~possible] == 0).all()
        chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
        assert chi_square < 29.6  # 99.9 % quantile, 10 degrees of freedom

    @pytest.mark.parametrize("columns", [2, 100, 8192, 58240])
    @pytest.mark.parametrize("uniform", [0.0, 2**-24, 0.5, 1 - 2**-11, LAST_FP32])
    def test_never_an_impossible_one(self, uniform: float, columns: int) -> None:
        generator = torch.Generator().manual_seed(columns)
        rows = torch.rand(8, columns, generator=generator)
        rows[:, 0] = rows[:, -1] = 0.0  # the ends are where rounding would land
        rows[:4, 1 : columns // 2] = 0.0
        rows[4:, columns // 2 :] = 0.0
        rows[:, columns // 2 - (columns > 2)] = 1e-7  # at least one is possible
        rows = rows / rows.sum(-1, keepdim=True)
        for dtype in (torch.float32, torch.float64):
            sampled = sample(rows, torch.full((8,), uniform, dtype=dtype))
            assert (sampled < columns).all()
            assert (rows.gather(-1, sampled[:, None]) > 0).all()

    def test_one_possible_candidate_is_always_sampled(self) -> None:
        chances = torch.eye(9)
        for uniform in (0.0, 0.3, LAST_FP32):
            assert sample(chances, torch.full((9,), uniform)).tolist() == list(range(9))

    def test_each_row_uses_its_own_number(self) -> None:
        chances = torch.tensor([[0.25, 0.25, 0.5]]).expand(5, -1)
        assert sample(chances, torch.tensor([0.0, 0.24, 0.25, 0.5, 0.99])).tolist() == [0, 0, 1, 2, 2]


def test_a_very_small_temperature_is_the_most_likely_token() -> None:
    chances = probabilities(logits_of(0.2, 0.4, 0.1, 0.3), Sampling(temperature=1e-6))
    assert chances.tolist() == [[0.0, 1.0, 0.0, 0.0]]
