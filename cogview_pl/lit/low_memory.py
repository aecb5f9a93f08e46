"""AdamW in less memory (torchao, extra `quant`): 8-bit moments, bf16 weights, or moments in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer

from cogview_pl.errors import UserError
from cogview_pl.kernels.torchao import import_torchao
from cogview_pl.lit.lightning_internals import torchao_adamw

Betas = tuple[float, float]


def adamw_8bit(params: Iterable[Any], *, lr: float, betas: Betas, eps: float) -> Optimizer:
    """AdamW with both moments in 8 bits and a scale for every 256 values (Dettmers et al. 2021).

    Tensors of fewer than 4,096 elements keep moments in the dtype of the weights. Arithmetic is fp32. bf16 weights are
    rounded up or down at random, so that steps smaller than the distance of two bf16 numbers count on average.
    """
    base = _torchao("adamw_8bit").AdamW8bit
    return _plain(base)(params, lr=lr, betas=tuple(betas), eps=eps, bf16_stochastic_round=True)


def adamw_bf16(params: Iterable[Any], *, lr: float, betas: Betas, eps: float) -> Optimizer:
    """AdamW for bf16 weights: bf16 moments, fp32 arithmetic, weights rounded at random as in `adamw_8bit`."""
    base = torchao_adamw(_torchao("adamw_bf16"))
    return _plain(base)(params, lr=lr, betas=tuple(betas), eps=eps, bf16_stochastic_round=True)


def adamw_offload(params: Iterable[Any], *, lr: float, betas: Betas, eps: float, offload_gradients: bool) -> Optimizer:
    """AdamW with its moments in host memory and its step on the CPU, while the backward pass goes on.

    Each gradient is copied to the host as soon as it exists, so nothing may change it afterwards: no clipping, loss
    scaling or averaging over devices.

    Args:
        params, lr, betas, eps: as for AdamW.
        offload_gradients: free each gradient on the device once it is copied; not with gradient accumulation.

    Raises:
        UserError: torchao is missing, or there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError("optimizer=adamw_offload moves state off a CUDA GPU and none was found; use optimizer=adamw")
    optim = _torchao("adamw_offload")
    # torchao makes a group of every tensor, and the learning-rate monitor refuses a name that occurs twice.
    groups = [{key: value for key, value in group.items() if key != "name"} for group in _as_groups(params)]
    options: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps}
    optimizer: Optimizer = optim.CPUOffloadOptimizer(
        groups, torch.optim.AdamW, offload_gradients=offload_gradients, **options
    )
    optimizer.defaults = options  # Lightning reads both, and torchao sets neither
    optimizer.state = {}  # type: ignore[assignment]  # nothing that could be moved to the device
    return optimizer


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    return [group if isinstance(group, dict) else {"params": [group]} for group in params]


def _torchao(name: str) -> Any:
    return import_torchao("torchao.optim", f"optimizer={name}")


@cache
def _plain(base: type[Optimizer]) -> Callable[..., Optimizer]:
    """A torchao optimizer that runs uncompiled on a CPU and saves plain tensors.

    torchao compiles the update for every shape. On a CPU this takes minutes and needs a C++ compiler. Lightning reads
    checkpoints with `weights_only=True`, which refuses torchao's tensor classes.
    """

    class Plain(base):  # type: ignore[misc, valid-type]
        one_by_one = True  # updates one tensor after the other, which the estimate of memory makes use of

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:  # outside of the stance, because it may run compiled code of the model
                with torch.enable_grad():
                    loss = closure()
            with self._stance():
                super().step()
            return loss

        def _stance(self) -> AbstractContextManager[Any]:
            devices = {parameter.device.type for group in self.param_groups for parameter in group["params"]}
            return torch.compiler.set_stance("force_eager") if devices == {"cpu"} else nullcontext()

        def state_dict(self) -> dict[str, Any]:
            found = super().state_dict()
            return {**found, "state": {index: _split(state) for index, state in found["state"].items()}}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            joined = {index: _join(state) for index, state in state_dict["state"].items()}
            super().load_state_dict({**state_dict, "state": joined})

    Plain.__name__ = base.__name__  # the logs name it: lr-AdamW8bit
    return Plain


def _split(state: dict[str, Any]) -> dict[str, Any]:
    """State with each 8-bit moment as two plain tensors, `NAME.codes` and `NAME.scale`."""
    from torchao.optim.subclass_8bit import OptimState8bit

    parts: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, OptimState8bit):
            parts |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale}
        else:
            parts[name] = value
    return parts


def _join(parts: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_split`."""
    from torchao.optim.subclass_8bit import OptimState8bit

    state = {name: value for name, value in parts.items() if not name.endswith((".codes", ".scale"))}
    for name in (name.removesuffix(".codes") for name in parts if name.endswith(".codes")):
        codes, scale = parts[f"{name}.codes"], parts[f"{name}.scale"]
        signed = name == "exp_avg"  # the second moment is a mean of squares
        moment = OptimState8bit.zeros(codes.shape, signed, codes.numel() // scale.numel(), codes.device, torch.float32)
        moment.codes.copy_(codes)
        moment.scale.copy_(scale)
        state[name] = moment
    return state
