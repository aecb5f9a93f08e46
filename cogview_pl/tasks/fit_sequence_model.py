"""task=pretrain, super_resolution, style, caption: train stage 2 on a token store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cogview_pl.assembly.checks import check_training, prepare_compiler
from cogview_pl.assembly.cpu_kernels import SETTING, training_kernels
from cogview_pl.assembly.devices import inference_device, weights_dtype
from cogview_pl.assembly.image_data import check_folders
from cogview_pl.assembly.kept_checkpoints import check_kept
from cogview_pl.assembly.lora import check_lora, describe_adapter, lora_identity, save_lora
from cogview_pl.assembly.model_specs import predicted_ids, transformer_settings
from cogview_pl.assembly.models import (
    check_positions,
    open_sequence_model,
    require_same,
)
from cogview_pl.assembly.options import ModelOptions, TrainingOptions, sequence_settings
from cogview_pl.assembly.strategy import gather_full_weights
from cogview_pl.assembly.token_data import (
    Tokens,
    open_tokens,
    replay_inputs,
    require_replay,
    training_sequences,
    validation_prompts,
    validation_sequences,
)
from cogview_pl.assembly.tokenization import Tokenization
from cogview_pl.assembly.trainer import data_module, optimizer_factory, seed_all, train
from cogview_pl.checkpoints.adapter_folder import Adapter, adapter_parts
from cogview_pl.checkpoints.model_folder import (
    SEQUENCE_MODEL,
    SequenceModel,
    build_template,
    build_transformer,
    save_sequence_model,
)
from cogview_pl.checkpoints.model_hash import model_hash
from cogview_pl.checkpoints.training_checkpoint import sequence_model_parts
from cogview_pl.config.parts import model_options, training_options
from cogview_pl.config.schema import Config
from cogview_pl.data.config import TokenSource
from cogview_pl.data.sequence_dataset import SequenceCollator
from cogview_pl.errors import UserError
from cogview_pl.generation.pipeline import ImageGenerator
from cogview_pl.kernels.config import CPUKernels
from cogview_pl.lit.sequence_model import SequenceModule, validation_metrics
from cogview_pl.runs.run_folder import RunFolder, predecessor
from cogview_pl.transformer.config import LoRAConfig
from cogview_pl.transformer.lora import add_lora
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, Vocabulary, makes_images
from cogview_pl.vocab.config import TemplateConfig
from cogview_pl.vocab.roles import check_trainable, slot_names

_OF_THE_WEIGHTS = ("vocab_size", "num_layers", "hidden_size", "num_heads", "num_positions", "norm")
"""Settings that a finetuned model shares with its base model."""

_LOGGED_PROMPTS = 64  # captions for callbacks that generate images during training


class Layout(NamedTuple):
    """Template, its constructor arguments, and those of the transformer, for one vocabulary."""

    template: Template
    template_settings: dict[str, Any]
    transformer_settings: dict[str, Any]


class Base(NamedTuple):
    """Model that a finetune starts from."""

    model: SequenceModel
    path: Path
    name: str
    """`init_from=PATH`, for messages."""


def check(config: Config) -> None:
    """Raises UserError for options that exclude each other and for missing folders, before any file is read."""
    options = training_options(config)
    check_trainable(config.template)
    if config.data.token_store is None and config.sequences.source == TokenSource.images:
        check_folders(config.data)
    check_lora(config.lora, config.model.hidden_size, starts_from_weights=options.starts_from_weights)
    check_training(options, shardable=True)
    check_kept(options, validation_metrics(slot_names(config.template.layout)))
    prepare_compiler(options)
    training_kernels(config.cpu_kernels, options)
    optimizer_factory(options)


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Train the sequence model and write `model/`; with LoRA `adapter/`, and `model/` if `lora.merge` is set."""
    seed_all(config.seed)
    training, models = training_options(config), model_options(config)
    inputs = replay_inputs(config.sequences, config.outputs)
    base = _open_base(models, config.template, config.init_from, config.starts_from)
    if base is not None:  # check sizes now: the run must not fail after an hour of tokenising
        inputs = {"init_from": model_hash(base.path), **inputs}
        _require_sizes(base, _layout(models, config.template, base.model.template.vocabulary))
        require_replay(config.sequences, config.outputs, base.model.text, base.model.image_tokenizer)
    with folder.processes.first_goes_ahead() as first:
        if first:  # recorded now, because a run that is stopped while it tokenises must resume with the same inputs
            folder.require_same({}, inputs, config.verify)
    device, _ = inference_device(config.trainer, config.precision)
    tokenization = Tokenization(config.data, config.token_store, config.text, config.template, config.verify, device)
    tokens = open_tokens(tokenization, config.sequences, models, folder, base and base.model)
    vocabulary = Vocabulary(tokens.store.header.codebook_size, tokens.text.vocab_size)
    layout = _layout(models, config.template, vocabulary)
    seed_all(config.seed)  # tokenising draws random numbers, and a resumed run may not tokenise
    model = build_transformer(layout.transformer_settings)
    if base is not None:
        _require_tokenizers(base, tokens, vocabulary)
        model.load_state_dict(base.model.model.state_dict(), assign=config.lora.rank > 0)  # share frozen weights
        base = base if config.lora.rank else None  # without LoRA, free its weights before training
    if config.lora.rank:
        add_lora(model, config.lora, held=weights_dtype(config.precision))
    model.set_activation_checkpointing(config.activation_checkpointing, compiled=config.compile)
    kernels = training_kernels(config.cpu_kernels, training)
    model.set_cpu_kernels(kernels == CPUKernels.compiled)
    module = _module(
        training,
        model,
        layout,
        tokens,
        slot_ids=predicted_ids(config.compat, layout.template),
        token_noise=config.sequences.token_noise,
    )
    data = data_module(
        training_sequences(tokens, layout.template, config.sequences, config.outputs),
        validation_sequences(tokens, layout.template),
        SequenceCollator(vocabulary.pad),
        config.data,
        training,
    )
    adapter = _adapter(config.lora, base, layout, tokens) if base else None
    identity = {**layout.transformer_settings, **(lora_identity(config.lora, base.model) if base else {})}
    metrics = train(
        training,
        folder,
        module,
        data,
        identity={"kind": SEQUENCE_MODEL, "settings": identity, "model": _parts(layout, tokens, adapter)},
        settings=sequence_settings(config.template, config.sequences) | ({SETTING: kernels.value} if kernels else {}),
        inputs=inputs | tokens.inputs,
        num_heads=config.model.num_heads,
    )
    gather_full_weights(config.strategy, model, keep=folder.writes)
    if folder.writes:
        full = save_lora(config.lora, folder, model, adapter, base.model) if base and adapter else model
        if full is not None:
            _save(folder, full, layout, tokens)
    return tokens.metrics | metrics


def _open_base(
    options: ModelOptions, template: TemplateConfig, init_from: str | None, starts_from: str | None
) -> Base | None:
    """The model in `init_from`, or in the newest run of the task `starts_from`; None: start from random weights."""
    if init_from is None and starts_from is None:
        return None
    path = predecessor(options.outputs, starts_from or "pretrain", "init_from", init_from)
    name = f"init_from={init_from or f'{options.outputs}/{starts_from}/latest'}"
    return Base(open_sequence_model(options, path, "init_from", template), path, name)


def _layout(options: ModelOptions, template: TemplateConfig, vocabulary: Vocabulary) -> Layout:
    settings = options.layout(template)
    built = build_template(settings, vocabulary)
    check_positions(built, options.transformer.num_positions)
    return Layout(built, settings, transformer_settings(options.transformer, vocabulary))


def _require_sizes(base: Base, layout: Layout) -> None:
    wanted = {key: layout.transformer_settings[key] for key in _OF_THE_WEIGHTS}
    require_same(base.model.settings["transformer"], wanted, base.name)


def _require_tokenizers(base: Base, tokens: Tokens, vocabulary: Vocabulary) -> None:
    sizes = {"codebook_size": vocabulary.codebook_size, "text_vocab_size": vocabulary.text_vocab_size}
    require_same(base.model.settings["vocabulary"], sizes, base.name)
    if base.model.text.identity != tokens.text.identity:
        raise UserError(
            f"{base.name} has another text tokenizer than the token store; tokenise with the tokenizer of that model"
        )
    if base.model.image_tokenizer.identity != tokens.image_tokenizer.identity:
        raise UserError(
            f"{base.name} has another image tokenizer than the token store, so their codes mean other images; tokenise "
            "with the tokenizer of that model, or give a model that was trained on this token store"
        )


def _module(
    options: TrainingOptions,
    model: Transformer,
    layout: Layout,
    tokens: Tokens,
    *,
    slot_ids: list[range] | None,
    token_noise: float,
) -> SequenceModule:
    template = layout.template
    loaded = SequenceModel(model, template, tokens.text, tokens.image_tokenizer, layout.transformer_settings)
    generates = makes_images(template) and not options.strategy.kind.sharded
    prompts, sources = validation_prompts(tokens, template, _LOGGED_PROMPTS) if generates else ([], None)
    return SequenceModule(
        model,
        slot_names=[slot.name for slot in template.slots],
        slot_ids=slot_ids,
        target=template.slots.index(template.target),
        token_noise=token_noise,
        optimizer=options.optimizer,
        build_optimizer=optimizer_factory(options),
        generator=ImageGenerator(loaded) if generates else None,
        val_prompts=prompts,
        val_sources=sources,
    )


def _adapter(options: LoRAConfig, base: Base, layout: Layout, tokens: Tokens) -> Adapter:
    return describe_adapter(
        options,
        start=base.model,
        base=base.path,
        transformer=layout.transformer_settings,
        template=layout.template_settings,
        image_tokenizer=tokens.image_tokenizer.identity,
    )


def _parts(layout: Layout, tokens: Tokens, adapter: Adapter | None) -> dict[str, Any]:
    """What checkpoints keep besides weights, so that they are models."""
    if adapter is not None:
        return adapter_parts(adapter, layout.template.vocabulary)
    return sequence_model_parts(
        layout.transformer_settings,
        layout.template_settings,
        layout.template.vocabulary,
        tokens.text,
        tokens.image_tokenizer,
    )


def _save(folder: RunFolder, model: Transformer, layout: Layout, tokens: Tokens) -> None:
    """Write `model/`."""
    save_sequence_model(
        folder / "model",
        model,
        transformer=layout.transformer_settings,
        template=layout.template_settings,
        vocabulary=layout.template.vocabulary,
        text=tokens.text,
        image_tokenizer=tokens.image_tokenizer,
    )
