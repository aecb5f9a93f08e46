"""Optimizer, learning-rate schedule and gradient norm of both stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from lightning import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from cogview_pl.errors import UserError
from cogview_pl.lit.config import OptimizerConfig
from cogview_pl.lit.schedule import Schedule, warmup_cosine
from cogview_pl.transformer.parallel import gradient_norm

BuildOptimizer = Callable[[Iterable[Any]], Optimizer]
"""Parameter groups → optimizer; learning rate and other arguments are bound already."""


_FORMS = {"fused", "foreach", "capturable", "differentiable", "maximize", "matrices"}
"""Switches of an optimizer that do not change its state."""


class ParameterGroup(NamedTuple):
    """Parameters that the optimizer treats alike."""

    name: str
    """Suffix of the learning rate in the logs: `lr-Muon/matrices`."""
    parameters: list[nn.Parameter]
    matrices: bool
    """Whether they are linear maps or filters inside the model; Muon is for these."""
    decay: bool
    own: dict[str, Any] = {}  # noqa: RUF012  # never changed
    """Hyperparameters of the group that differ from those of the optimizer."""


def configure_optimizers(
    build: BuildOptimizer, options: OptimizerConfig, groups: Iterable[ParameterGroup], max_steps: int
) -> dict[str, Any]:
    """Lightning's optimizer dictionary, with warm-up and cosine per step.

    A resumed run has the configured hyperparameters, not those of its checkpoint.
    """
    optimizer = build(
        [
            {
                "name": group.name,
                "params": group.parameters,
                "weight_decay": options.weight_decay if group.decay else 0.0,
                "matrices": group.matrices,
                **group.own,
            }
            for group in groups
        ]
    )
    _keep_hyperparameters(optimizer)
    end = options.schedule_steps or max_steps
    factor = warmup_cosine(end, options.warmup, options.final_lr, options.schedule_start)
    schedule = Schedule(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _keep_hyperparameters(optimizer: Optimizer) -> None:
    """Have the optimizer keep its configured hyperparameters when a saved state is loaded.

    torch restores the saved ones, so that a resumed run would silently ignore a changed weight decay or beta.
    """
    inside = [*getattr(optimizer, "optim_dict", {}).values(), getattr(optimizer, "d_opt", None)]  # torchao's offloading
    for one in filter(None, inside if hasattr(optimizer, "optim_dict") else [optimizer]):
        one.register_load_state_dict_pre_hook(_with_configured)


def _with_configured(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A saved state with the hyperparameters of the optimizer; raises UserError if they need another state."""
    groups = []
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=False):
        now = {name: value for name, value in group.items() if name != "params"}
        for name in now.keys() & saved.keys() - _FORMS:
            if _needs_other_state(name, saved[name], now[name], state_dict["state"]):
                raise UserError(
                    f"resume: optimizer.optimizer.{name} was {saved[name]} and is {now[name]}, and the checkpoint does "
                    f"not have the state that this needs; go on with optimizer.optimizer.{name}={saved[name]}, or "
                    "start anew from the weights with init_from"
                )
        groups.append({**saved, **now})
    groups += state_dict["param_groups"][len(groups) :]  # torch refuses another number of groups
    return {**state_dict, "param_groups": groups}


def _needs_other_state(name: str, before: Any, now: Any, states: dict[int, dict[str, Any]]) -> bool:
    """Whether the saved states do not fit a new value: of a switch such as `amsgrad`, or of `momentum` that was 0."""
    if name == "momentum":
        kept = {key for state in states.values() for key in state}  # none: the next step makes a state
        return bool(now) and not before and bool(kept) and not any(name in key for key in kept)
    return isinstance(before, bool) and isinstance(now, bool) and before != now


def logs_this_step(trainer: Trainer) -> bool:
    """Whether loggers write the metrics of the step under way."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def log_gradient_norm(
    module: LightningModule, network: nn.Module | None = None, name: str = "train/gradient_norm"
) -> None:
    """Log the L2 norm of all gradients of a network of the module, or of the whole module.

    It reads all of them, so it does so at logging steps only.
    """
    if logs_this_step(module.trainer):
        gradients = [p.grad for p in (network or module).parameters() if p.grad is not None]
        module.log(name, gradient_norm(gradients))
