"""The cheapest overrides that make a run fit, found by trying them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import product
from typing import Any, NamedTuple

from cogview_pl.choices import ActivationCheckpointing, Quantization, StrategyKind, Verb
from cogview_pl.config import Config

_HALVINGS = 6
_DEVICES = (2, 4, 8)


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

    Args:
        config: a run that does not fit.
        fits: whether a configuration does.
        on_gpu: some help there only.
    """
    combinations = [[r for r in chosen if r.text] for chosen in product(*_levers(config, on_gpu))]
    for chosen in sorted(combinations, key=lambda remedies: (sum(r.cost for r in remedies), len(remedies))):
        if chosen and fits(changed(config, {key: value for r in chosen for key, value in r.changes.items()})):
            return " ".join(remedy.text for remedy in chosen)
    return None


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


def _levers(config: Config, on_gpu: bool) -> list[list[Remedy]]:
    """Per lever its settings, of which one is taken; the first is to leave it."""
    fp32 = config.precision.get("precision") == "32-true"
    half = Remedy(4, "precision=bf16", {"precision.precision": "bf16-mixed", "optimizer.optimizer.fused": False})
    levers: list[list[Remedy]] = []
    if config.verb == Verb.fit_sequence_model:
        levers.append(_fewer_sequences(config))
        if config.activation_checkpointing == ActivationCheckpointing.none:
            levers.append([_NOTHING, _checkpointing("selective", 2), _checkpointing("block", 3)])
        levers += [[_NOTHING, half]] if fp32 and on_gpu else []
        levers += [_optimizers(config), _more_devices(config)] if on_gpu else []
    elif config.verb == Verb.fit_image_tokenizer:
        levers.append(_fewer_sequences(config))
        levers += [[_NOTHING, half]] if fp32 and on_gpu else []
    elif config.verb == Verb.tokenize:
        levers.append(list(_halved("data.batch_size", config.data.batch_size)))
    elif config.verb in (Verb.generate, Verb.rerank, Verb.magnify, Verb.evaluate):
        levers.append(list(_halved("sampler.batch_size", config.sampler.batch_size)))
        if fp32 and on_gpu:
            levers.append([_NOTHING, Remedy(2, "precision=bf16", {"precision.precision": "bf16-mixed"})])
        if config.weights is None:
            levers.append([_NOTHING, Remedy(5, "weights=int8", {"weights": Quantization.int8})])
    return levers


def _halved(key: str, size: int) -> Iterator[Remedy]:
    yield _NOTHING
    for cost in range(1, _HALVINGS + 1):
        if size >= 2**cost:
            yield Remedy(cost, f"{key}={size >> cost}", {key: size >> cost})


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


def _checkpointing(choice: str, cost: int) -> Remedy:
    return Remedy(
        cost,
        f"activation_checkpointing={choice}",
        {"activation_checkpointing": ActivationCheckpointing(choice)},
    )


def _optimizers(config: Config) -> list[Remedy]:
    target = {"optimizer.optimizer._target_": "torchao.optim.AdamW8bit", "optimizer.optimizer.fused": False}
    return [_NOTHING, Remedy(6, "optimizer=adamw_8bit", target)]


def _more_devices(config: Config) -> list[Remedy]:
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
