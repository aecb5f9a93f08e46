"""LoRA in a finetune: checks of its options, its identity in checkpoints, and the files that the run writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogview_pl.checkpoints.adapter_folder import FOLDER, Adapter, save_adapter
from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.transformer.config import LoRAConfig, LoRATarget
from cogview_pl.transformer.lora import adapter_state, merge
from cogview_pl.transformer.model import Transformer


def check_lora(options: LoRAConfig, hidden_size: int, *, starts_from_weights: bool) -> None:
    """Raises UserError if options of `lora:` are impossible.

    Args:
        options: options of the adapters.
        hidden_size: hidden size of the model.
        starts_from_weights: whether training starts from the weights of a model.
    """
    if not options.rank:
        return
    if not starts_from_weights:
        raise UserError(
            f"lora.rank={options.rank}: LoRA trains adapters of a trained model, and this run starts from random "
            "weights; set init_from, or lora.rank=0"
        )
    if options.rank > hidden_size:
        raise UserError(f"lora.rank={options.rank} must not be above model.hidden_size={hidden_size}")
    if not options.targets or len(set(options.targets)) < len(options.targets):
        names = ", ".join(target.value for target in LoRATarget)
        raise UserError(f"lora.targets={_names(options)} must hold at least one of {names}, and none of them twice")


def lora_identity(options: LoRAConfig, start: SequenceModel) -> dict[str, Any]:
    """Settings that a resumed run compares, besides those of the model."""
    return {
        "lora.rank": options.rank,
        "lora.alpha": options.alpha,
        "lora.targets": _names(options),
        "weights of init_from": start.identity,
    }


def describe_adapter(
    options: LoRAConfig,
    *,
    start: SequenceModel,
    base: Path,
    transformer: Mapping[str, Any],
    template: Mapping[str, Any],
    image_tokenizer: str,
) -> Adapter:
    """An adapter before its training, without weights.

    Args:
        options: options of the adapters.
        start: base model, as it was read from `base`.
        base: folder or file of the base model.
        transformer, template: constructor arguments.
        image_tokenizer: identity of the image tokenizer.
    """
    return Adapter(
        weights={},
        lora=options,
        transformer=transformer,
        template=template,
        base=str(base.resolve()),
        base_identity=start.identity,
        image_tokenizer=image_tokenizer,
    )


def save_lora(
    options: LoRAConfig, folder: RunFolder, model: Transformer, adapter: Adapter, start: SequenceModel
) -> Transformer | None:
    """Write `adapter/`; with `lora.merge` return the base model with the adapter merged into its weights.

    Merging changes `start` in place. The frozen weights of `model` may share its memory, so do not use `model` or
    `start` afterwards.

    Args:
        options: options of the adapters.
        folder: folder of the run.
        model: trained model with adapters.
        adapter: what `describe_adapter` gave.
        start: base model.
    """
    weights = {name: tensor.cpu() for name, tensor in adapter_state(model).items()}
    save_adapter(folder / FOLDER, replace(adapter, weights=weights))
    if not options.merge:
        return None
    merge(start.model, weights, options.alpha)
    return start.model


def _names(options: LoRAConfig) -> list[str]:
    return [target.value for target in options.targets]
