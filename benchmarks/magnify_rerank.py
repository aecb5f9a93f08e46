"""Super-resolution in windows, and ranking by caption loss.

Shapes: B images, g x g the grid of their codes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.contest import Work, contest
from benchmarks.report import Result, Row, result
from benchmarks.settings import DEVICE, DTYPES, IMAGE_CODES, TEXT, TOP_K, captioner, super_resolution
from cogview_pl.generation.config import Sampling
from cogview_pl.generation.rerank import caption_losses
from cogview_pl.generation.super_resolution.parallel_windows import timetable
from cogview_pl.generation.super_resolution.upscale import magnify
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template

GRID, IMAGES = 8, 8
CANDIDATES, CANDIDATE_GRID, RANKED_AT_ONCE = 16, 32, 8
_SAME_LOSS = 1e-3  # nats; batches sum in another order than single images
_SAME_IMAGES = 0.5  # smallest share of equal images; rounding changes about one code in ten thousand


def magnify_rows() -> list[Row]:
    """S1 with grids of 8 x 8 codes, because 32 x 32 codes take too long on a CPU."""
    return [Row(f"magnify:S1-fp32-grid{GRID}-x{IMAGES}", partial(measure_magnify, "S1", GRID, IMAGES))]


def rerank_rows() -> list[Row]:
    """S1 with 16 candidates of 1,024 codes."""
    measure = partial(measure_rerank, "S1", "fp32", CANDIDATES, CANDIDATE_GRID, RANKED_AT_ONCE)
    return [Row(f"rerank:S1-fp32-x{CANDIDATES}", measure)]


def measure_magnify(shape: str, grid: int, images: int, rounds: int = 3) -> Result:
    """Milliseconds per image, fp32: windows in parallel, in a batch and one image at a time, and windows in order.

    Raises:
        RuntimeError: too many images of a batch have other codes than the same images alone.
    """
    codes = _codes(images, grid)
    model, template = super_resolution(shape, grid)
    in_order, _ = super_resolution(shape, grid, norm_scope="tensor")
    each = [partial(magnified, model, template, codes[i : i + 1], first_seed=i) for i in range(images)]
    contenders: dict[str, Work] = {
        "a batch": partial(magnified, model, template, codes),
        "one after the other": lambda: torch.cat([one() for one in each]),
        "windows in order, tensor scope": partial(magnified, in_order, template, codes[:1]),
    }
    together, alone = contenders["a batch"](), contenders["one after the other"]()
    same = float((together == alone).flatten(1).all(1).float().mean())  # type: ignore[union-attr, attr-defined]
    if same < _SAME_IMAGES:
        raise RuntimeError(f"magnify: only {same:.0%} of the images of a batch have the codes that they have alone")
    units = {"a batch": images, "one after the other": images}
    found = result("ms/image", contest(contenders, rounds), units)
    found.facts["images with the codes that they have alone"] = same
    found.facts["images/s of a batch"] = 1e3 / found.values["a batch"]
    found.facts["images/s, batch / one after the other"] = found.values["one after the other"] / found.values["a batch"]
    for edge in (grid, 32):  # the released models upscale grids of 32
        found.facts[f"passes, {edge}x{edge} codes, in parallel"] = len(timetable(edge))
        found.facts[f"passes, {edge}x{edge} codes, in order"] = (2 * edge) ** 2
    return found


def measure_rerank(shape: str, dtype: str, candidates: int, grid: int, at_once: int, rounds: int = 3) -> Result:
    """Milliseconds per candidate: caption losses in batches, and with one forward pass per candidate.

    Raises:
        RuntimeError: the losses differ (fp32).
    """
    model, template = captioner(shape, grid)
    model, codes = model.to(DTYPES[dtype]), _codes(candidates, grid)
    batches = partial(scored, model, template, codes, at_once)
    singly = partial(scored, model, template, codes, 1)
    if dtype == "fp32" and not torch.allclose(batches(), singly(), atol=_SAME_LOSS):
        raise RuntimeError("rerank: a batch has other caption losses than its images by themselves")
    contenders: dict[str, Work] = {f"batches of {at_once}": batches, "one forward each": singly}
    found = result("ms/candidate", contest(contenders, rounds), dict.fromkeys(contenders, candidates))
    found.facts["s for all"] = found.values[f"batches of {at_once}"] * candidates / 1e3
    return found


def magnified(model: Transformer, template: Template, codes: Tensor, first_seed: int = 0) -> Tensor:
    """Codes `(B, 2g, 2g)`; image i has seed `first_seed + i`."""
    seeds = range(first_seed, first_seed + len(codes))
    return magnify(model, template, [TEXT] * len(codes), codes, seeds=seeds, sampling=Sampling(top_k=TOP_K))


def scored(model: Transformer, template: Template, codes: Tensor, at_once: int) -> Tensor:
    """Caption losses `(B,)` in nats, `at_once` images in a forward pass."""
    return torch.cat([caption_losses(model, template, [TEXT] * len(part), part) for part in codes.split(at_once)])


def _codes(images: int, grid: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, IMAGE_CODES, (images, grid, grid), device=DEVICE)
