"""Metrics of ranking by caption loss: the best of N images, and the rank of an image's own caption."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import islice
from statistics import fmean
from typing import NamedTuple

import torch


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


def place_of_own(losses: Sequence[float]) -> int:
    """Place of the own caption, which is the first one, by loss: 1 is the best; it ranks last among equal losses."""
    return sum(loss <= losses[0] for loss in losses)


def information(losses: Sequence[Sequence[float]], captions: Sequence[Sequence[int]]) -> list[list[float]]:
    """Caption losses less the mean loss of each caption, for each image: estimates of negative pointwise information.

    A short or common caption has a low loss with every image, which says nothing about any of them (Holtzman et al.
    2021, arXiv 2104.08315). The mean of a caption is over all images that it was scored with.

    Args:
        losses: caption losses of each image, in nats per text token.
        captions: numbers of the captions that these are the losses of.
    """
    sums: dict[int, list[float]] = {}
    for values, numbers in zip(losses, captions, strict=True):
        for value, number in zip(values, numbers, strict=True):
            sums.setdefault(number, []).append(value)
    means = {number: fmean(values) for number, values in sums.items()}
    return [
        [value - means[number] for value, number in zip(values, numbers, strict=True)]
        for values, numbers in zip(losses, captions, strict=True)
    ]


def retrieval(places: Sequence[int], top: Sequence[int]) -> dict[int, float]:
    """For each k in `top`, the share of images whose own caption is among the k best captions.

    Args:
        places: place of the own caption of each image, by `place_of_own`.
        top: values of k.
    """
    return {k: fmean(place <= k for place in places) for k in top}


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
    order = torch.randperm(len(meanings), generator=torch.Generator().manual_seed(own)).numpy()
    others = list(islice((int(index) for index in order if meanings[index] != meanings[own]), count))
    if len(others) < count:
        raise ValueError(f"{count} others wanted, {len(others)} say something else")
    return others
