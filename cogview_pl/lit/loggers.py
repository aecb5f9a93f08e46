"""Loggers: names of curves in TensorBoard, and images for every logger that takes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from cogview_pl.errors import UserError

_FIRST = ("train/loss", "train/psnr", "val/")
_COLUMNS = 4  # images across a grid; more are too small to be seen in TensorBoard
_BORDER = 2
_EXTRAS = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
"""Class of a logger → the package that it needs, and the extra of the same name."""


class LossesFirst(TensorBoardLogger):
    """TensorBoard's event files, in which losses come before other curves.

    TensorBoard sorts groups of curves by name. So measures of the validation are in the group `val`, and all groups but
    `train` and `val` get names that come later: `perf/tokens_per_s` becomes `watch-perf/tokens_per_s`.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({curve_name(name): value for name, value in metrics.items()}, step)

    def log_hyperparams(  # type: ignore[override]
        self, params: dict[str, Any], metrics: dict[str, Any] | None = None, step: int | None = None
    ) -> None:
        """Log hyperparameters for the HParams tab, with the metrics that are to stand next to them."""
        named = {curve_name(name): value for name, value in (metrics or {}).items()}
        super().log_hyperparams(params, named, step)


def curve_name(metric: str) -> str:
    """Name of a metric in TensorBoard; a name that has been changed does not change again."""
    if metric.startswith("eval/"):
        return metric.replace("eval/", "val/", 1)
    return metric if metric.startswith((*_FIRST, "watch-")) else f"watch-{metric}"


def require_packages(nodes: Iterable[Mapping[str, Any]]) -> None:
    """Raises UserError if the package of a logger is not installed; `nodes` are its `_target_` nodes."""
    for node in nodes:
        package = _EXTRAS.get(str(node.get("_target_")).rpartition(".")[2])
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f'logger={package} needs {package}; pip install "cogview_pl[{package}]"')


def takes_images(trainer: Trainer) -> bool:
    """Whether a logger of this process shows images."""
    kinds = (TensorBoardLogger, WandbLogger, MLFlowLogger)
    return trainer.is_global_zero and any(isinstance(logger, kinds) for logger in trainer.loggers)


def log_images(trainer: Trainer, tag: str, images: Sequence[Tensor], captions: Sequence[str] = ()) -> None:
    """Log images of one size, uint8 `(3, Y, X)`, and their captions, as those of the present step.

    TensorBoard gets a grid, and the captions as a numbered text, because it shows grids too small for captions.
    """
    step = trainer.global_step
    grid = make_grid(list(images), nrow=_COLUMNS, padding=_BORDER, pad_value=255) if len(images) > 1 else images[0]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, grid.cpu(), step)
            if captions:
                numbered = "\n".join(f"{number}. {caption}" for number, caption in enumerate(captions, start=1))
                logger.experiment.add_text(f"{tag}_captions", numbered, step)
        elif isinstance(logger, WandbLogger):
            shown = {"caption": list(captions)} if captions else {}
            logger.log_image(tag, [to_pil_image(image) for image in images], step, **shown)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, to_pil_image(grid), key=tag, step=step)
