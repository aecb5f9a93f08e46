"""LoRA in a finetune: what `lora:` asks for, and what the run leaves of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogview_pl.assembly.models import starts_from_weights, weights_dtype
from cogview_pl.checkpoints.adapter_folder import FOLDER, Adapter, save_adapter
from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.config.schema import Config
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.transformer.config import LoRAConfig, LoRATarget
from cogview_pl.transformer.lora import adapter_state, add_lora, merge
from cogview_pl.transformer.model import Transformer


def check_lora(config: Config) -> None:
    """Raises UserError if `lora:` asks for what cannot be."""
    options = config.lora
    if not options.rank:
        return
    if not starts_from_weights(config):
        raise UserError(
            f"lora.rank={options.rank}: LoRA trains beside the weights of a model, and this run starts from random "
            "ones; set init_from, or lora.rank=0"
        )
    if options.rank > config.model.hidden_size:
        raise UserError(f"lora.rank={options.rank} must not be above model.hidden_size={config.model.hidden_size}")
    if not options.targets or len(set(options.targets)) < len(options.targets):
        names = ", ".join(target.value for target in LoRATarget)
        raise UserError(f"lora.targets={_names(options)} must hold at least one of {names}, and none of them twice")


def check_lora_alone(config: Config, start: SequenceModel | None, image_tokenizer: str) -> None:
    """Raises UserError if an adapter without `model/` would lose its image tokenizer, which is not that of its base."""
    if not config.lora.rank or config.lora.merge or start is None:
        return
    if start.image_tokenizer.identity != image_tokenizer:
        raise UserError(
            "lora.merge=false leaves an adapter, which uses the image tokenizer of the model in init_from, and the "
            "token store was made with another one; set lora.merge=true"
        )


def adapt(config: Config, model: Transformer) -> None:
    """Freeze a model and add adapters, as `lora:` says; nothing with `lora.rank=0`."""
    if config.lora.rank:
        add_lora(model, config.lora, held=weights_dtype(config))


def lora_options(config: Config) -> dict[str, Any]:
    """Options of the adapters, and the precision `held` of what they leave frozen; empty with `lora.rank=0`."""
    options = config.lora
    if not options.rank:
        return {}
    held = weights_dtype(config)
    return {"rank": options.rank, "alpha": options.alpha, "targets": options.targets, "held": held}


def lora_identity(config: Config, start: SequenceModel | None) -> dict[str, Any]:
    """What a checkpoint of this run is compared by, beyond the model's own settings."""
    if not config.lora.rank or start is None:
        return {}
    options = config.lora
    return {
        "lora.rank": options.rank,
        "lora.alpha": options.alpha,
        "lora.targets": _names(options),
        "weights of init_from": start.identity,
    }


def save_lora(
    config: Config,
    folder: RunFolder,
    model: Transformer,
    *,
    start: SequenceModel,
    base: Path,
    transformer: Mapping[str, Any],
    template: Mapping[str, Any],
    image_tokenizer: str,
) -> Transformer | None:
    """Write `adapter/`; returns a model with the adapter in its weights where `lora.merge` wants one.

    That is `start`, whose memory the frozen weights of `model` may share: neither is of use any more.

    Args:
        config, folder: of the run.
        model: trained, with adapters.
        start: the model that it was trained beside, as it was read from `base`.
        transformer, template: constructor arguments.
        image_tokenizer: identity of the image tokenizer.
    """
    options = config.lora
    weights = {name: tensor.cpu() for name, tensor in adapter_state(model).items()}
    adapter = Adapter(
        weights=weights,
        lora=options,
        transformer=transformer,
        template=template,
        base=str(base.resolve()),
        base_identity=start.identity,
        image_tokenizer=image_tokenizer,
    )
    save_adapter(folder / FOLDER, adapter)
    if not options.merge:
        return None
    merge(start.model, weights, options.alpha)
    return start.model


def _names(options: LoRAConfig) -> list[str]:
    return [target.value for target in options.targets]
