"""Requirements of metrics: their names, numbers of images, and prompts that can be judged."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cogview_pl.errors import UserError
from cogview_pl.evaluation.config import EvaluateConfig
from cogview_pl.evaluation.lpips import KEY as LPIPS_KEY
from cogview_pl.generation.rerank import Captioner
from cogview_pl.toy_world.accuracy import asked_style, names_objects
from cogview_pl.vocab import TextSlot

METRICS = ("reconstruction", "fid", "is", "caption_loss", "toy", "style")
WITH_NETWORK = {"reconstruction", "fid", "is", "style"}
"""Metrics that need a feature network."""
WITH_REFERENCE = {"reconstruction", "fid"}
"""Metrics that need real images."""
WITH_PROMPTS = ("caption_loss", "toy", "style")
"""Metrics that need the prompt of each generated image."""


def wanted_metrics(options: EvaluateConfig) -> set[str]:
    """The metrics to measure; raises UserError for unknown metrics, and for options that do not fit them."""
    unknown = [name for name in options.metrics if name not in METRICS]
    if unknown or not options.metrics:
        found = f"unknown metric {unknown[0]!r}" if unknown else "found none"
        raise UserError(f"evaluate.metrics: {found}; use some of {', '.join(METRICS)}")
    if "fid" in options.metrics and not options.blur:
        raise UserError("evaluate.blur: found no radius; FID needs one at least, 0 for no blur")
    wrong = [radius for radius in options.blur if not (radius >= 0 and math.isfinite(radius))]
    if wrong:
        raise UserError(f"evaluate.blur: found {wrong[0]}; a radius is at least 0")
    if options.lpips is not None and "reconstruction" not in options.metrics:
        raise UserError(f"{LPIPS_KEY} is measured on reconstructions; add reconstruction to evaluate.metrics")
    return set(options.metrics)


def require_enough(wanted: set[str], is_splits: int, generated: int, real: int | None) -> None:
    """Raises UserError if a wanted metric has too few images.

    Args:
        wanted: names of metrics.
        is_splits: number of parts of IS; each needs an image.
        generated: number of generated images.
        real: number of real images; None if no metric needs any.
    """
    needs = {
        "reconstruction": (0, 2),  # a covariance needs two images
        "fid": (2, 2),
        "is": (is_splits, 0),
    }
    for name in METRICS:
        if name not in wanted:
            continue
        least, least_real = needs.get(name, (1, 0))
        if generated < least:
            raise UserError(
                f"evaluate.metrics: {name} needs {least} generated images at least, and {generated} can be read; "
                "give more in pairs, images or prompts"
            )
        if real is not None and real < least_real:
            raise UserError(
                f"evaluate.metrics: {name} needs {least_real} reference images at least, and {real} can be read; "
                "give more in evaluate.reference or the validation split"
            )


def check_prompts(wanted: set[str], captioner: Captioner | None, base_style: str, prompts: Sequence[str]) -> None:
    """Raises UserError for a prompt that is too long for the captioner, or if a metric can judge no prompt."""
    if captioner is not None:
        slot = captioner.template.target
        assert isinstance(slot, TextSlot)
        for prompt in prompts:
            length = len(captioner.text.encode(prompt))
            if length > slot.length:
                raise UserError(
                    f"evaluate.metrics: caption_loss of {prompt[:40]!r}: it has {length} text tokens, the captioner in "
                    f"rerank_with holds {slot.length}; shorten it"
                )
    if "toy" in wanted and not any(map(names_objects, prompts)):
        raise UserError(
            "evaluate.metrics: toy needs prompts that name colour, shape, size and place of objects, and none of the "
            f"{len(prompts)} does; leave it out"
        )
    if "style" in wanted and not any(asked_style(prompt, base_style) for prompt in prompts):
        raise UserError(
            "evaluate.metrics: style needs prompts that name a style or objects of the toy world, and none of the "
            f"{len(prompts)} does; leave it out"
        )


def refuse_without_prompts(wanted: set[str], images: object) -> None:
    """Raises UserError for metrics that need prompts, because `images` names files without prompts."""
    without = [name for name in WITH_PROMPTS if name in wanted]
    if without:
        raise UserError(
            f"evaluate.metrics: {without[0]} needs prompts, and images={images} has none; give pairs, or "
            f"leave out {', '.join(without)}"
        )
