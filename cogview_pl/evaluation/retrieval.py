"""Metrics of ranking by caption loss: the best of N images, and the rank of an image's own caption."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Ranked(NamedTuple):
    """A ranked image of a prompt."""

    seed: int
    caption_loss: float
    right: bool
    """Whether it shows all objects of the prompt."""


def best_of(prompts: Sequence[Sequence[Ranked]]) -> dict[int, tuple[float, float]]:
    """Best-of-N curve: N → share of prompts with a right best image, and share with any right image (oracle).

    N is 1, 2, 4, … images per prompt, those with the lowest seeds. The best image has the lowest caption loss.

    Args:
        prompts: images of each prompt, the same number for all prompts.
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
    """For each k, the share of images whose own caption is among the k captions with the lowest loss.

    Args:
        losses: `(B, N)`, the own caption in column 0; it ranks last among equal losses.
        places: values of k.
    """
    better = (losses[:, 1:] <= losses[:, :1]).sum(1)
    return {k: float((better < k).float().mean()) for k in places}


def other_captions(meanings: Sequence[Hashable], own: int, count: int) -> list[int]:
    """Indices of `count` random captions with another meaning than caption `own`; `own` is the seed.

    A caption of another image with the same meaning is true for this image too, so it is never drawn.

    Args:
        meanings: meaning of each caption, as a value to compare.
        own: index of the caption.
        count: number of captions to draw.

    Raises:
        ValueError: fewer captions have another meaning.
    """
    order = torch.randperm(len(meanings), generator=torch.Generator().manual_seed(own)).tolist()
    others = [index for index in order if meanings[index] != meanings[own]]
    if len(others) < count:
        raise ValueError(f"{count} others wanted, {len(others)} say something else")
    return others[:count]
