"""task=pretrain and its relatives: train stage 2 on a token store."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cogview_pl.assembly.checks import check_levers
from cogview_pl.assembly.compiler import prepare_compiler
from cogview_pl.assembly.lora import adapt, check_lora, check_lora_alone, lora_identity, save_lora
from cogview_pl.assembly.model_specs import predicted_ids, transformer_settings
from cogview_pl.assembly.models import (
    check_positions,
    check_precision,
    layout_settings,
    model_hash,
    open_image_tokenizer,
    open_sequence_model,
    starts_from_weights,
)
from cogview_pl.assembly.strategy import check_strategy, make_whole
from cogview_pl.assembly.token_data import (
    ImageTokenizers,
    Tokens,
    open_tokens,
    replay_inputs,
    training_sequences,
    validation_captions,
    validation_sequences,
)
from cogview_pl.assembly.tokenization import Tokenization
from cogview_pl.assembly.trainer import optimizer_factory, seed, train
from cogview_pl.checkpoints.model_folder import SEQUENCE_MODEL, SequenceModel, build_template, save_sequence_model
from cogview_pl.config.schema import Config
from cogview_pl.data.sequence_dataset import SequenceCollator
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.pipeline import CogView
from cogview_pl.lit.data_module import DataModule
from cogview_pl.lit.sequence_model import SequenceModule
from cogview_pl.runs.run_folder import RunFolder, predecessor
from cogview_pl.tasks.fit_image_tokenizer import require_same
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, Vocabulary, is_text_to_image
from cogview_pl.vocab.roles import check_trainable

_OF_THE_WEIGHTS = ("vocab_size", "num_layers", "hidden_size", "num_heads", "num_positions", "norm")
"""Settings in which a finetuned model must equal the one that it starts from."""

_LOGGED_PROMPTS = 64  # captions kept for the callbacks that paint during training


class Layout(NamedTuple):
    """What follows from the configuration and a vocabulary."""

    template: Template
    template_settings: dict[str, Any]
    transformer_settings: dict[str, Any]


class Base(NamedTuple):
    """The model that a finetune starts from, and where it was read."""

    model: SequenceModel
    path: Path


def check(config: Config) -> None:
    """Raises UserError for what does not go together, before anything is read."""
    check_precision(config)
    check_trainable(config.template)
    check_lora(config)
    check_levers(config)
    check_strategy(config, spreads=True)
    prepare_compiler(config)
    optimizer_factory(config)


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Train the sequence model and write `model/`, or with LoRA `adapter/` and maybe `model/`."""
    seed(config)
    base = _open_base(config)
    inputs = replay_inputs(config.sequences, config.outputs)
    if base is not None:
        inputs = {"init_from": model_hash(base.path), **inputs}
    if base is not None:  # what does not fit must not surface after an hour of tokenising
        _require_sizes(config, base.model, _layout(config, base.model.template.vocabulary).transformer_settings)
    with folder.processes.first_goes_ahead() as first:
        if first:  # noted now: a run that is stopped while it tokenises must go on with the same ones
            folder.require_same({}, inputs, config.verify)
    options = Tokenization(config.data, config.token_store, config.text, config.template.layout, config.verify)
    opens = partial(open_image_tokenizer, config)
    image_tokenizers = ImageTokenizers(config.outputs, config.image_tokenizer.path, opens)
    tokens = open_tokens(options, config.sequences, image_tokenizers, folder, base and base.model)
    vocabulary = Vocabulary(tokens.store.header.codebook_size, tokens.text.vocab_size)
    layout = _layout(config, vocabulary)
    seed(config)  # tokenising has drawn numbers, and does not when the run goes on
    model = Transformer(**layout.transformer_settings)
    if base is not None:
        _require_tokenizers(config, base.model, tokens, vocabulary)
        check_lora_alone(config, base.model, tokens.image_tokenizer.identity)
        model.load_state_dict(base.model.model.state_dict(), assign=config.lora.rank > 0)  # share what is frozen
        base = base if config.lora.rank else None  # else its weights would stay beside those that train
    adapt(config, model)
    model.set_training_pass(recompute=config.activation_checkpointing.value, compiled=config.compile)
    identity = {**layout.transformer_settings, **lora_identity(config, base and base.model)}
    module, data = _module(config, model, layout, tokens), _data(config, layout.template, tokens)
    inputs |= tokens.inputs
    metrics = train(config, folder, module, data, {"kind": SEQUENCE_MODEL, "settings": identity}, inputs)
    make_whole(config, model, keep=folder.writes)
    if folder.writes:
        _save(config, folder, model, layout, tokens, base)
    return tokens.metrics | metrics


def _module(config: Config, model: Transformer, layout: Layout, tokens: Tokens) -> SequenceModule:
    template = layout.template
    loaded = SequenceModel(model, template, tokens.text, tokens.image_tokenizer, layout.transformer_settings)
    paints = is_text_to_image(template) and not config.strategy.kind.spreads
    return SequenceModule(
        model,
        slot_names=[slot.name for slot in template.slots],
        slot_ids=predicted_ids(config, template),
        target=template.slots.index(template.target),
        token_noise=config.sequences.token_noise,
        optimizer=optimizer_factory(config),
        painter=CogView(loaded) if paints else None,
        val_prompts=validation_captions(tokens, template, _LOGGED_PROMPTS) if paints else [],
    )


def _data(config: Config, template: Template, tokens: Tokens) -> DataModule:
    return DataModule(
        training_sequences(tokens, template, config.sequences, config.outputs),
        validation_sequences(tokens, template),
        collate=SequenceCollator(template.vocabulary.pad),
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        seed=config.seed,
        worker_timeout=config.data.worker_timeout,
        look=SIGNALS.check_while_waiting,
    )


def _save(
    config: Config, folder: RunFolder, model: Transformer, layout: Layout, tokens: Tokens, base: Base | None
) -> None:
    """Write what the run leaves; `base` is what adapters were trained beside, None without LoRA."""
    whole: Transformer | None = model
    if base is not None:
        whole = save_lora(
            config,
            folder,
            model,
            start=base.model,
            base=base.path,
            transformer=layout.transformer_settings,
            template=layout.template_settings,
            image_tokenizer=tokens.image_tokenizer.identity,
        )
    if whole is not None:
        save_sequence_model(
            folder / "model",
            whole,
            transformer=layout.transformer_settings,
            template=layout.template_settings,
            vocabulary=layout.template.vocabulary,
            text=tokens.text,
            image_tokenizer=tokens.image_tokenizer,
        )


def _layout(config: Config, vocabulary: Vocabulary) -> Layout:
    template_settings = layout_settings(config, config.template)
    template = build_template(template_settings, vocabulary)
    settings = transformer_settings(config, vocabulary)
    check_positions(template, settings["num_positions"])
    return Layout(template, template_settings, settings)


def _open_base(config: Config) -> Base | None:
    """The model in `init_from`, or that of the newest run of the task to start from; None: random weights."""
    if not starts_from_weights(config):
        return None
    path = predecessor(config.outputs, config.starts_from or "pretrain", "init_from", config.init_from)
    return Base(open_sequence_model(config, path, "init_from", config.template), path)


def _require_sizes(config: Config, start: SequenceModel, settings: dict[str, Any]) -> None:
    wanted = {key: settings[key] for key in _OF_THE_WEIGHTS}
    require_same(start.settings["transformer"], wanted, _source(config))


def _require_tokenizers(config: Config, start: SequenceModel, tokens: Tokens, vocabulary: Vocabulary) -> None:
    sizes = {"codebook_size": vocabulary.codebook_size, "text_vocab_size": vocabulary.text_vocab_size}
    require_same(start.settings["vocabulary"], sizes, _source(config))
    if start.text.identity != tokens.text.identity:
        raise UserError(
            f"{_source(config)} was trained with another text tokenizer than the token store; tokenise with its"
        )


def _source(config: Config) -> str:
    return f"init_from={config.init_from or f'{config.outputs}/{config.starts_from}/latest'}"
