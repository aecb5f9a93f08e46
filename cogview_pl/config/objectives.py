"""Refuses an `objective` that a task cannot have, before it runs."""

from __future__ import annotations

from omegaconf import DictConfig

from cogview_pl.config.choices import Verb
from cogview_pl.config.keys import did_you_mean, nearest_words
from cogview_pl.errors import UserError

_USUAL: dict[Verb, tuple[str, ...]] = {
    Verb.fit_image_tokenizer: (
        "val/loss_reconstruction",
        "val/loss_commitment",
        "eval/psnr",
        "train/loss",
        "codebook/usage",
        "codebook/perplexity",
    ),
    Verb.fit_sequence_model: ("val/loss", "train/loss"),
    Verb.fit_features: ("features/style_accuracy", "features/mean_average_precision", "features/terms_found"),
}
"""Verb → metrics of every run of it."""


def check_objective(config: DictConfig) -> None:
    """Raises UserError if the objective resembles a usual metric of the task, and is none.

    Other names pass, because a callback of the user may log them.
    """
    usual = _USUAL.get(config.verb, ())
    if config.objective is None or config.objective in usual:
        return
    if guesses := [name for name in nearest_words(config.objective, usual) if not config.objective.startswith(name)]:
        raise UserError(f"objective={config.objective}: task={config.task} has no such metric{did_you_mean(guesses)}")
