"""The learning-rate schedule of both stages: warm-up and cosine, by optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(end: int, warmup: float, final: float, start: int = 0) -> Callable[[int], float]:
    """Factor of the peak learning rate at a step.

    It rises linearly over a share `warmup` of the steps from `start` to `end`, and falls as a cosine to `final` at
    `end`. It starts from 0, or from `final` if an extended run warms up again (`start` above 0). Steps outside have
    the factor `final`.
    """
    steps = end - start
    rising = max(1, round(warmup * steps))
    floor = final if start else 0.0

    def factor(step: int) -> float:
        step -= start
        if step < 0:
            return final
        if step < rising:
            return floor + (1 - floor) * (step + 1) / rising
        progress = min(1.0, (step - rising) / max(1, steps - rising))
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    return factor


class Schedule(LambdaLR):
    """Learning rates of a configured peak and factor, also after its state is restored.

    torch restores the saved peaks, so that a resumed run would keep the learning rate that it was begun with. Here only
    the step is restored.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved step; load the state of the optimizer before."""
        peaks = self.base_lrs
        super().load_state_dict(state_dict)
        self.base_lrs = peaks
        rates = [peak * factor(self.last_epoch) for peak, factor in zip(peaks, self.lr_lambdas, strict=True)]
        for group, peak, rate in zip(self.optimizer.param_groups, peaks, rates, strict=True):
            group["initial_lr"] = peak
            if isinstance(group["lr"], Tensor):  # torchao's optimizers
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates
