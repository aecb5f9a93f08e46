"""The cheapest overrides that make a run fit, found by trying them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from itertools import product
from typing import Any, NamedTuple

from cogview_pl.assembly.checks import ADAMW_8BIT
from cogview_pl.config.choices import Verb
from cogview_pl.config.schema import Config
from cogview_pl.errors import UserError
from cogview_pl.generation.config import Quantization
from cogview_pl.lit.config import StrategyKind
from cogview_pl.memory.bridge import check_levers, check_strategy, starts_from_weights
from cogview_pl.transformer.config import ActivationCheckpointing

_HALVINGS = 6
_DEVICES = (2, 4, 8)
_RANK = 8  # of adapters

TRAINS = (Verb.fit_image_tokenizer, Verb.fit_sequence_model)
"""Verbs that train by Lightning."""


class Remedy(NamedTuple):
    """Overrides that belong together."""

    cost: int
    """How much one would rather not: time first, then other numbers, then more packages, then more machines."""
    text: str
    """As one types them; empty for none."""
    changes: Mapping[str, Any]
    """What they do to the configuration, by dotted key."""


_NOTHING = Remedy(0, "", {})


def cheapest(config: Config, fits: Callable[[Config], bool], *, on_gpu: bool) -> str | None:
    """The overrides of lowest cost with which the run fits; None where none of those that are tried does.

    Nothing is named that training would refuse.

    Args:
        config: a run that does not fit.
        fits: whether a configuration does; the smaller its batches, the sooner.
        on_gpu: some help there only.
    """
    batches, *levers = _levers(config, on_gpu)
    best: tuple[int, int, str] | None = None
    for others in sorted(product(*levers), key=_cost):
        if best is not None and _cost(others) >= best[0]:
            break
        if not _works([batches[-1], *others], config, fits):  # smaller ones there are none
            continue
        chosen = [_largest(batches, others, config, fits), *others]
        words = [remedy.text for remedy in chosen if remedy.text]
        found = _cost(chosen), len(words), " ".join(words)
        best = found if best is None else min(best, found)
    return None if best is None else best[2]


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of a configuration with other values, by dotted key."""
    found = deepcopy(config)
    for path, value in changes.items():
        *way, last = path.split(".")
        node: Any = found
        for name in way:
            node = node[name] if isinstance(node, dict) else getattr(node, name)
        if isinstance(node, dict):
            node[last] = value
        else:
            setattr(node, last, value)
    return found


def _cost(remedies: Iterable[Remedy]) -> int:
    return sum(remedy.cost for remedy in remedies)


def _largest(batches: list[Remedy], others: Iterable[Remedy], config: Config, fits: Callable[[Config], bool]) -> Remedy:
    """The first batch, from the largest on, with which the run fits; with the last it does."""
    return batches[bisect_left(batches[:-1], True, key=lambda batch: _works([batch, *others], config, fits))]


def _works(remedies: list[Remedy], config: Config, fits: Callable[[Config], bool]) -> bool:
    """Whether a run would start with these overrides, and fit."""
    other = changed(config, {key: value for remedy in remedies for key, value in remedy.changes.items()})
    try:
        if other.verb in TRAINS:
            check_levers(other)
            check_strategy(other, spreads=other.verb == Verb.fit_sequence_model)
        return fits(other)
    except UserError:  # does not go together, or needs a package that is not there
        return False


def _levers(config: Config, on_gpu: bool) -> list[list[Remedy]]:
    """Per lever its settings, of which one is taken; the first is to leave it. Smaller batches come first."""
    if config.verb == Verb.fit_sequence_model:
        levers = [_fewer_sequences(config), _numbers(config, on_gpu)]
        if config.activation_checkpointing == ActivationCheckpointing.none:
            levers.append([_NOTHING, _checkpointing("selective", 2), _checkpointing("block", 3)])
        if not config.lora.rank and starts_from_weights(config):
            levers.append([_NOTHING, Remedy(5, f"lora.rank={_RANK}", {"lora.rank": _RANK})])
        return [*levers, _more_devices()] if on_gpu else levers
    if config.verb == Verb.fit_image_tokenizer:
        return [_fewer_sequences(config), _numbers(config, on_gpu)]
    if config.verb == Verb.tokenize:
        return [_halved("data.batch_size", config.data.batch_size)]
    if config.verb in (Verb.generate, Verb.rerank, Verb.magnify, Verb.evaluate):
        levers = [_halved("sampler.batch_size", config.sampler.batch_size)]
        if on_gpu and _in_fp32(config):
            levers.append([_NOTHING, Remedy(2, "precision=bf16", {"precision.precision": "bf16-mixed"})])
        if config.quantization is None and not config.strategy.kind.sharded:
            levers.append([_NOTHING, Remedy(5, "quantization=int8", {"quantization": Quantization.int8})])
        return levers
    return [[_NOTHING]]


def _halved(key: str, size: int) -> list[Remedy]:
    halvings = [cost for cost in range(1, _HALVINGS + 1) if size >= 2**cost]
    return [_NOTHING, *(Remedy(cost, f"{key}={size >> cost}", {key: size >> cost}) for cost in halvings)]


def _fewer_sequences(config: Config) -> list[Remedy]:
    """Smaller batches, as many more of them to a step: the same gradients."""
    size, steps = config.data.batch_size, config.trainer["accumulate_grad_batches"]
    found = [_NOTHING]
    for cost in range(1, _HALVINGS + 1):
        if size % 2**cost:
            break
        batch, batches = size >> cost, steps << cost
        keys = {"data.batch_size": batch, "trainer.accumulate_grad_batches": batches}
        found.append(Remedy(cost, " ".join(f"{key}={value}" for key, value in keys.items()), keys))
    return found


def _numbers(config: Config, on_gpu: bool) -> list[Remedy]:
    """Precision of arithmetic, weights and optimizer state, which do not all go together."""
    if not on_gpu:
        return [_NOTHING]
    node = config.optimizer.optimizer
    shared = {key: value for key, value in node.items() if key in ("_partial_", "lr", "betas", "eps")}
    in_8_bits = {"optimizer.optimizer": {**shared, "_target_": ADAMW_8BIT}}
    found = [_NOTHING, Remedy(6, "optimizer=adamw_8bit", in_8_bits)]
    if _in_fp32(config):
        half: dict[str, Any] = {"precision.precision": "bf16-mixed"}
        unfused = {"optimizer.optimizer.fused": False} if node.get("fused") else {}
        found.append(Remedy(4, "precision=bf16", {**half, **unfused}))
        found.append(Remedy(10, "precision=bf16 optimizer=adamw_8bit", {**half, **in_8_bits}))
    pure = {"precision.precision": "bf16-true", **in_8_bits}
    return [*found, Remedy(12, "precision=bf16_true optimizer=adamw_8bit", pure)]


def _in_fp32(config: Config) -> bool:
    return bool(config.precision["precision"] == "32-true")


def _checkpointing(choice: str, cost: int) -> Remedy:
    changes = {"activation_checkpointing": ActivationCheckpointing(choice)}
    return Remedy(cost, f"activation_checkpointing={choice}", changes)


def _more_devices() -> list[Remedy]:
    return [
        _NOTHING,
        *(
            Remedy(
                12 + number,
                f"strategy=fsdp trainer.devices={devices}",
                {"strategy.kind": StrategyKind.fsdp, "trainer.devices": devices},
            )
            for number, devices in enumerate(_DEVICES)
        ),
    ]
