"""What metrics need: names that a user may list, numbers of images, prompts that can be judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cogview_pl.errors import UserError
from cogview_pl.evaluation.config import EvaluateConfig
from cogview_pl.evaluation.lpips import KEY as LPIPS_KEY
from cogview_pl.generation.rerank import Captioner
from cogview_pl.toy_world.accuracy import asked_style, names_objects
from cogview_pl.vocab import TextSlot


class Needs(NamedTuple):
    """Requirements of a metric."""

    network: bool = False
    """Sees images by the feature network."""
    prompts: bool = False
    """Compares each generated image with its prompt."""
    generated: int = 1
    """Least number of generated images."""
    real: int = 0
    """Least number of real images; 0 for a metric without them."""


METRICS = {
    "reconstruction": Needs(network=True, generated=0, real=2),  # a covariance needs two images
    "fid": Needs(network=True, generated=2, real=2),
    "is": Needs(network=True),
    "caption_loss": Needs(prompts=True),
    "toy": Needs(prompts=True),
    "style": Needs(network=True, prompts=True),
}
"""Names for `evaluate.metrics`, in the order of checks; `evaluation.Evaluation` measures them."""


def need_network(wanted: set[str]) -> bool:
    """Whether a wanted metric sees images by the feature network."""
    return any(METRICS[name].network for name in wanted)


def need_reference(wanted: set[str]) -> bool:
    """Whether a wanted metric compares with real images."""
    return any(METRICS[name].real for name in wanted)


def wanted_metrics(options: EvaluateConfig) -> set[str]:
    """The metrics to measure; raises UserError for unknown ones, and for options that do not suit them."""
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
    """Raises UserError where there are too few images for a wanted metric.

    Args:
        wanted: metrics.
        is_splits: number of parts that IS is the mean over, hence its least number of generated images.
        generated: number of generated images.
        real: number of real images; None where no metric needs any.
    """
    for name, needs in METRICS.items():
        if name not in wanted:
            continue
        least = is_splits if name == "is" else needs.generated
        if generated < least:
            raise UserError(
                f"evaluate.metrics: {name} needs {least} generated images at least, and {generated} can be read; "
                "give more in pairs, images or prompts"
            )
        if real is not None and real < needs.real:
            raise UserError(
                f"evaluate.metrics: {name} needs {needs.real} reference images at least, and {real} can be read; "
                "give more in evaluate.reference or the validation split"
            )


def check_prompts(wanted: set[str], captioner: Captioner | None, base_style: str, prompts: Sequence[str]) -> None:
    """Raises UserError for a prompt that the captioner cannot take, and for prompts that a metric cannot judge."""
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
    """Raises UserError for metrics that need prompts, where `images` names files without any."""
    without = [name for name in METRICS if name in wanted and METRICS[name].prompts]
    if without:
        raise UserError(
            f"evaluate.metrics: {without[0]} needs prompts, and images={images} has none; give pairs, or "
            f"leave out {', '.join(without)}"
        )
