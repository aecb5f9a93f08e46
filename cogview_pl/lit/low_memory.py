"""AdamW in less memory, by torchao (extra `quant`): state in 8 bits, weights in bf16, or state in the host's memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer

from cogview_pl.errors import UserError

Betas = tuple[float, float]


def adamw_8bit(params: Iterable[Any], *, lr: float, betas: Betas, eps: float) -> Optimizer:
    """AdamW whose two moments are held in 8 bits, with a scale for every 256 of them (Dettmers et al. 2021).

    Tensors of fewer than 4,096 elements keep moments in the precision of the weights. Arithmetic is fp32; weights in
    bf16 are rounded up or down at random, so that steps smaller than the distance of two bf16 numbers count.
    """
    base = _torchao("adamw_8bit").AdamW8bit
    return _suited(base)(params, lr=lr, betas=tuple(betas), eps=eps, bf16_stochastic_round=True)


def adamw_bf16(params: Iterable[Any], *, lr: float, betas: Betas, eps: float) -> Optimizer:
    """AdamW for weights in bf16: moments in bf16, arithmetic in fp32, weights rounded at random as in `adamw_8bit`."""
    base = _torchao("adamw_bf16")._AdamW
    return _suited(base)(params, lr=lr, betas=tuple(betas), eps=eps, bf16_stochastic_round=True)


def adamw_offload(params: Iterable[Any], *, lr: float, betas: Betas, eps: float, offload_gradients: bool) -> Optimizer:
    """AdamW whose moments lie in the host's memory and whose step runs on the CPU, while the backward pass goes on.

    Gradients cross over as they are made, so nothing may change them afterwards: no clipping, loss scaling or
    averaging over devices.

    Args:
        params, lr, betas, eps: as for AdamW.
        offload_gradients: free each gradient on the device once it has crossed; not with gradient accumulation.

    Raises:
        UserError: torchao is missing, or there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError("optimizer=adamw_offload moves state off a CUDA GPU and none was found; use optimizer=adamw")
    optim = _torchao("adamw_offload")
    # Every tensor becomes a group of its own, and the monitor of the learning rate takes no name twice.
    groups = [{key: value for key, value in group.items() if key != "name"} for group in _as_groups(params)]
    options: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps}
    optimizer: Optimizer = optim.CPUOffloadOptimizer(
        groups, torch.optim.AdamW, offload_gradients=offload_gradients, **options
    )
    optimizer.defaults = options  # both are read by Lightning, and torchao leaves them out
    optimizer.state = {}  # type: ignore[assignment]  # nothing that could be moved to the device
    return optimizer


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    return [group if isinstance(group, dict) else {"params": [group]} for group in params]


def _torchao(name: str) -> Any:
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # warns of how torchao registers its enums
    try:
        import torchao.optim
    except ImportError as error:
        raise UserError(f'optimizer={name} needs torchao; pip install "cogview_pl[quant]"') from error
    return torchao.optim


@cache
def _suited(base: type[Optimizer]) -> Callable[..., Optimizer]:
    """An optimizer of torchao's that runs uncompiled on a CPU and saves plain tensors.

    torchao compiles the update for every shape, which on a CPU takes minutes and a C++ compiler. And Lightning's way
    of reading checkpoints has no place for tensors of a class of their own.
    """

    class Suited(base):  # type: ignore[misc, valid-type]
        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:  # before, because it may hold compiled code of the model
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
            return {**found, "state": {index: _apart(state) for index, state in found["state"].items()}}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            whole = {index: _together(state) for index, state in state_dict["state"].items()}
            super().load_state_dict({**state_dict, "state": whole})

    Suited.__name__ = base.__name__  # in the logs: lr-AdamW8bit
    return Suited


def _apart(state: dict[str, Any]) -> dict[str, Any]:
    """Moments in 8 bits as `NAME.codes` and `NAME.scale`."""
    from torchao.optim.subclass_8bit import OptimState8bit

    parts: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, OptimState8bit):
            parts |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale}
        else:
            parts[name] = value
    return parts


def _together(parts: dict[str, Any]) -> dict[str, Any]:
    """What `_apart` was given."""
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
