"""What ranking is worth: the best of N images by caption loss against one at random and against the true best."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Ranked(NamedTuple):
    """One of several images of a prompt."""

    seed: int
    caption_loss: float
    right: bool
    """Whether it shows what the prompt asks for."""


def best_of(prompts: Sequence[Sequence[Ranked]]) -> dict[int, tuple[float, float]]:
    """For N = 1, 2, 4, … images of each prompt: share of prompts whose best by caption loss is right, and whose
    images hold a right one at all (the oracle). The N images are those with the lowest seeds.

    Args:
        prompts: per prompt its images, of which all have equally many.
    """
    curve = {}
    ordered = [sorted(images) for images in prompts]
    number = 1
    while number <= len(ordered[0]):
        groups = [images[:number] for images in ordered]
        chosen = [min(group, key=lambda image: image.caption_loss).right for group in groups]
        possible = [any(image.right for image in group) for group in groups]
        curve[number] = (sum(chosen) / len(chosen), sum(possible) / len(possible))
        number *= 2
    return curve


def retrieval(losses: Tensor, places: Sequence[int]) -> dict[int, float]:
    """For each k, the share of images whose own caption is among the k with the lowest caption loss.

    Args:
        losses: `(B, N)`, the own caption in column 0; of equal losses the own one counts as the higher.
        places: the values of k.
    """
    better = (losses[:, 1:] <= losses[:, :1]).sum(1)
    return {k: float((better < k).float().mean()) for k in places}


def other_captions(meanings: Sequence[Hashable], own: int, count: int) -> list[int]:
    """Indices of `count` captions that say something else than caption `own`, drawn by that index alone.

    A caption that says the same of another image is no false one, so it is never drawn.

    Args:
        meanings: what each caption says; equal values say the same.

    Raises:
        ValueError: there are not so many.
    """
    order = torch.randperm(len(meanings), generator=torch.Generator().manual_seed(own)).tolist()
    others = [index for index in order if meanings[index] != meanings[own]]
    if len(others) < count:
        raise ValueError(f"{count} others wanted, {len(others)} say something else")
    return others[:count]
