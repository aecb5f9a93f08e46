"""Completion: given codes stay, the others are sampled as if the given ones had been, and their likelihood is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from cogview_pl.assembly.pipelines import GenerationPipeline
from cogview_pl.errors import UserError
from cogview_pl.generation.completion import (
    check_algorithm,
    is_prefix,
    known_codes,
    mask_of,
    num_given_first,
    without_the_rest,
)
from cogview_pl.generation.config import Algorithm, CompletionConfig, Engine, Sampling
from cogview_pl.generation.decode import SCORED, TO_SAMPLE, decode
from cogview_pl.generation.pipeline import ImageGenerator
from cogview_pl.generation.speculative import decode_jacobi

from .test_guidance import EMPTY, NUM_CODES, PROMPTS, TEMPLATE, make, make_template, sequence_model

LENGTH = TEMPLATE.target.length
GRID = (4, 4)
GIVEN = torch.randint(NUM_CODES, (len(PROMPTS), LENGTH), generator=torch.Generator().manual_seed(3))
TOP = torch.arange(LENGTH) >= 8
BOX = torch.tensor([y in (1, 2) and x in (1, 2) for y in range(4) for x in range(4)])
MASKS = {"prefix": TOP, "box": BOX, "bottom": ~TOP, "first": torch.arange(LENGTH) == 0}
SAMPLING = Sampling(top_k=0)


def completed(
    mask_T: Tensor, sampling: Sampling = SAMPLING, given: Tensor = GIVEN, **changes: object
) -> tuple[Tensor, Tensor]:
    """Codes `(B, T)` of the prompts, and log-likelihoods `(B, L)` of given codes after generated ones."""
    scores: list[Tensor] = []
    rows = decode(
        make(**changes),
        TEMPLATE,
        PROMPTS,
        seeds=range(4),
        sampling=sampling,
        unconditional=[EMPTY] * 4,
        known=given.masked_fill(mask_T, TO_SAMPLE),
        on_known=scores.append,
    )
    return torch.tensor(rows), torch.cat(scores, 1) if scores else torch.empty(4, 0)


@torch.no_grad()
def full_logs(codes_BT: Tensor, guidance: float) -> Tensor:
    """Log-probabilities `(B, T, n)` of every code by full forward passes."""
    model, found = make(), []
    for prompt, codes in zip(PROMPTS, codes_BT.tolist(), strict=True):
        halves = [
            model(torch.tensor([[*start, *codes]]))[0, len(start) - 1 : -1, :NUM_CODES] for start in (prompt, EMPTY)
        ]
        found.append((halves[1] + guidance * (halves[0] - halves[1])).log_softmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize("engine", [Engine.torch, Engine.auto])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("name", MASKS)
def test_given_codes_stay_and_their_likelihood_is_that_of_a_full_pass(
    name: str, guidance: float, engine: Engine
) -> None:
    mask_T = MASKS[name]
    codes_BT, scores_BL = completed(mask_T, replace(SAMPLING, guidance=guidance, engine=engine))
    assert torch.equal(codes_BT[:, ~mask_T], GIVEN[:, ~mask_T])
    after_T = ~mask_T & (torch.arange(LENGTH) > int(mask_T.int().argmax()))
    assert scores_BL.shape == (4, int(after_T.sum()))
    each_BT = full_logs(codes_BT, guidance).gather(-1, codes_BT[..., None])[..., 0]
    torch.testing.assert_close(scores_BL, each_BT[:, after_T], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("name", MASKS)
def test_the_rest_is_sampled_as_if_the_given_part_had_been(name: str, guidance: float) -> None:
    sampling = replace(SAMPLING, guidance=guidance)
    whole_BT, _ = completed(torch.ones(LENGTH, dtype=torch.bool), sampling)
    again_BT, _ = completed(MASKS[name], sampling, given=whole_BT)
    assert torch.equal(again_BT, whole_BT)
    assert torch.equal(completed(MASKS[name], sampling, given=whole_BT)[0], whole_BT)


@pytest.mark.parametrize("name", MASKS)
def test_greedy_codes_are_those_without_a_cache(name: str) -> None:
    codes_BT, _ = completed(MASKS[name], Sampling(temperature=0))
    likeliest_BT = full_logs(codes_BT, 1.0).argmax(-1)
    assert torch.equal(codes_BT[:, MASKS[name]], likeliest_BT[:, MASKS[name]])


def test_a_prefix_of_a_model_whose_norm_spans_the_tensor() -> None:
    prompts = [PROMPTS[0]] * 2  # rows must be equally long
    known = GIVEN[:2].masked_fill(TOP, TO_SAMPLE)
    rows = decode(make(norm_scope="tensor"), TEMPLATE, prompts, seeds=range(2), sampling=SAMPLING, known=known)
    assert torch.equal(torch.tensor(rows)[:, ~TOP], GIVEN[:2, ~TOP])


def test_steps_on_fixed_memory_complete_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where each step is a captured graph."""
    plainly, _ = completed(TOP)
    monkeypatch.setattr("cogview_pl.generation.decode.can_capture", lambda *_: True)
    codes_BT, scores_BL = completed(TOP)
    assert torch.equal(codes_BT, plainly) and not scores_BL.numel()


def test_long_given_parts_are_scored_in_pieces() -> None:
    template = make_template(grid="8x4")
    mask_T = torch.arange(32) == 1
    scores: list[Tensor] = []
    known = GIVEN.repeat(1, 2).masked_fill(mask_T, TO_SAMPLE)
    decode(
        make(num_positions=60),
        template,
        PROMPTS,
        seeds=range(4),
        sampling=SAMPLING,
        known=known,
        on_known=scores.append,
    )
    assert [score.shape[1] for score in scores] == [SCORED, 30 - SCORED]


@pytest.mark.parametrize("drafts", [1, 5, 40])
def test_jacobi_completes_a_prefix(drafts: int) -> None:
    sampling = Sampling(temperature=0, drafts=drafts)
    found = decode_jacobi(make(), TEMPLATE, PROMPTS, seeds=range(4), sampling=sampling, known=GIVEN[:, ~TOP].tolist())
    assert torch.equal(torch.tensor(found.rows), completed(TOP, sampling)[0])


@pytest.fixture(scope="module")
def generator() -> ImageGenerator:
    return ImageGenerator(sequence_model())


def test_batches_and_seeds_of_completions(generator: ImageGenerator) -> None:
    prompts = ["红色", "蓝色的心形", "一个绿色的三角形"]
    known = known_codes(GIVEN[:3].view(3, *GRID), BOX.view(GRID))

    def sampled(batch_size: int) -> tuple[Tensor, list[float]]:
        parts = generator.completions(prompts, known, 2, seed=5, sampling=Sampling(batch_size=batch_size))
        codes, losses = zip(*parts, strict=True)
        return torch.cat(codes), [loss for part in losses for loss in part or ()]

    together, losses = sampled(64)
    by_four, losses_of_four = sampled(4)
    assert torch.equal(by_four, together)
    assert losses_of_four == pytest.approx(losses, rel=1e-5)
    (alone,) = generator.completions(prompts[2:], known[2:], 1, seed=6, sampling=Sampling())
    assert torch.equal(alone.codes[0], together[5])
    assert alone.given_losses == pytest.approx(losses[5:], rel=1e-5)
    (prefix,) = generator.completions(
        prompts[:1], known_codes(GIVEN[:1].view(1, *GRID), TOP.view(GRID)), sampling=SAMPLING
    )
    assert prefix.given_losses is None


def test_images_come_in_the_order_of_the_likelihood_of_given_codes(generator: ImageGenerator) -> None:
    pipeline = GenerationPipeline(generator, None, None, SAMPLING)
    known = known_codes(GIVEN[:2].view(2, *GRID), BOX.view(GRID))
    made = list(pipeline.generate(["红色", "蓝色"], num_images_per_prompt=4, top_n=3, seed=1, known=known))
    assert [image.prompt for image in made] == ["红色"] * 3 + ["蓝色"] * 3
    for images in (made[:3], made[3:]):
        losses = [image.given_loss for image in images]
        assert losses == sorted(losses) and len(set(losses)) == 3  # type: ignore[type-var]


@pytest.mark.parametrize(
    "keep, grid, kept",
    [
        ("top:0.5", (4, 4), torch.arange(16) < 8),
        ("bottom:0.25", (4, 4), torch.arange(16) >= 12),
        ("left:.5", (4, 4), torch.arange(16) % 4 < 2),
        ("right:0.26", (4, 4), torch.arange(16) % 4 == 3),
        ("top:0.5", (5, 1), torch.arange(5) < 2),
        ("border:0.25", (4, 4), ~BOX),
    ],
)
def test_sides(keep: str, grid: tuple[int, int], kept: Tensor) -> None:
    mask = mask_of(CompletionConfig(keep=keep), grid, 64)
    assert torch.equal(mask.flatten(), ~kept)
    assert is_prefix(mask) == keep.startswith("top")
    assert num_given_first(mask) == int((~kept).int().argmax())


def test_only_prefixes_go_with_jacobi() -> None:
    jacobi = Sampling(algorithm=Algorithm.jacobi)
    check_algorithm(TOP.view(GRID), jacobi)
    check_algorithm(BOX.view(GRID), SAMPLING)
    with pytest.raises(UserError, match=r"sampler\.algorithm=jacobi .* set sampler\.algorithm=sequential"):
        check_algorithm(BOX.view(GRID), jacobi)


def paint(file: Path, size: tuple[int, int], box: tuple[int, int, int, int] | None) -> str:
    """A black image with a white box (left, top, right, bottom; exclusive)."""
    image = Image.new("L", size, 0)
    if box is not None:
        image.paste(255, box)
    image.save(file)
    return str(file)


@pytest.mark.parametrize(
    "size, box",
    [((4, 4), (1, 1, 3, 3)), ((64, 64), (16, 16, 48, 48)), ((64, 64), (31, 31, 33, 33))],
    ids=["codes", "pixels", "a_few_pixels"],
)
def test_a_code_with_a_white_pixel_is_generated(
    tmp_path: Path, size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    mask = mask_of(CompletionConfig(mask=paint(tmp_path / "mask.png", size, box)), GRID, 64)
    assert torch.equal(mask.flatten(), BOX)


def test_masks_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    cases = {
        "complete.mask=.*48x64 pixels; make it 64x64.* or 4x4": paint(tmp_path / "a.png", (48, 64), (0, 0, 9, 9)),
        "complete.mask=.*has no white pixels": paint(tmp_path / "b.png", (64, 64), None),
        "complete.mask=.*leaves no code as it is": paint(tmp_path / "c.png", (4, 4), (0, 0, 4, 4)),
        "complete.mask=.*not an image": str(tmp_path / "text.png"),
        "complete.mask=.*gone.png: file not found": str(tmp_path / "gone.png"),
    }
    for message, file in cases.items():
        with pytest.raises(UserError, match=message):
            mask_of(CompletionConfig(mask=file), GRID, 64)
    for keep in ("top", "0.5", "middle:0.5", "top:-1", "top:x"):
        with pytest.raises(
            UserError, match=r"must be top, bottom, left, right or border, and its share of the edge, such as top:0\.5"
        ):
            mask_of(CompletionConfig(keep=keep), GRID, 64)
    for keep in ("top:0", "top:0.1", "left:1", "right:7", "border:0.5"):
        with pytest.raises(UserError, match=r"of 4 codes along an edge; give a share that keeps from 1 to [13]"):
            mask_of(CompletionConfig(keep=keep), GRID, 64)
    with pytest.raises(UserError, match="are both given"):
        mask_of(CompletionConfig("top:0.5", "mask.png"), GRID, 64)
    with pytest.raises(UserError, match="nothing is kept"):
        mask_of(CompletionConfig(), GRID, 64)


def test_what_is_not_given_is_grey() -> None:
    image = torch.arange(192, dtype=torch.uint8).view(3, 8, 8)
    shown = without_the_rest(image, TOP.view(GRID))
    assert torch.equal(shown[:, :4], image[:, :4])
    assert len(shown[:, 4:].unique()) == 1
