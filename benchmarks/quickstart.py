"""Training steps of the quickstart: sizes, batches and optimizer of its stages, on the toy world.

A step is forward pass, backward pass, clipping and optimizer; Lightning and the data loader are left out. Codes of
images are random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks import gemm
from benchmarks.contest import Work, contest
from benchmarks.report import Result, Row, result
from cogview_pl.assembly.cpu_kernels import training_kernels
from cogview_pl.assembly.image_data import open_images
from cogview_pl.assembly.model_specs import predicted_ids, transformer_settings, vqvae_settings
from cogview_pl.assembly.trainer import optimizer_factory
from cogview_pl.checkpoints.model_folder import build_template, build_transformer, build_vqvae
from cogview_pl.config.parts import model_options, training_options
from cogview_pl.config.schema import Config, register_schemas
from cogview_pl.config.shipped import experiments
from cogview_pl.data.samples import CaptionedImages
from cogview_pl.data.sequence_dataset import SequenceBatch, SequenceCollator
from cogview_pl.kernels.config import CPUKernels
from cogview_pl.lit.image_tokenizer import to_unit_range
from cogview_pl.lit.sequence_model import with_noise
from cogview_pl.transformer.loss import sequence_loss
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import CodeSlot, Template, Vocabulary
from cogview_pl.vocab.text import TextTokenizer
from cogview_pl.vqvae.losses import reconstruction_loss

IMAGE_TOKENIZER = "vqvae"
SEQUENCE_MODELS = ("pretrain", "super_resolution", "style", "caption")
_CAPTIONS = 1000  # captions that the text tokenizer learns from
_BATCHES = 6  # batches of a call, as their lengths differ


def rows() -> list[Row]:
    """One row per stage that trains."""
    sequences = [Row(f"train:quickstart-{stage}", partial(measure_sequences, stage)) for stage in SEQUENCE_MODELS]
    return [*sequences, Row(f"train:quickstart-{IMAGE_TOKENIZER}", measure_images)]


def measure_sequences(stage: str, rounds: int = 7) -> Result:
    """Milliseconds per step with the recipe's optimizer, with AdamW, and of the matrix products of the blocks alone."""
    config = configuration(stage)
    batches = sequence_batches(config)[1]
    tokens = sum(batch.tokens[:, 1:].numel() for batch in batches) // len(batches)
    linears = gemm.linears_of_step(config.model.num_layers, config.model.hidden_size, 0, tokens)[:-1]
    contenders = {
        "ours": sequence_steps(config),
        "ours, AdamW": sequence_steps(configuration(stage, "adamw")),
        "matrix products": gemm.floor(linears, "fp32"),
    }
    units = {"ours": _BATCHES, "ours, AdamW": _BATCHES}
    return result("ms", contest(contenders, rounds), units, **{"tokens of a batch, with padding": tokens})


def measure_images(rounds: int = 7) -> Result:
    """Milliseconds per step of the image tokenizer with the recipe's optimizer, and with AdamW."""
    contenders = {
        "ours": image_steps(configuration(IMAGE_TOKENIZER)),
        "ours, AdamW": image_steps(configuration(IMAGE_TOKENIZER, "adamw")),
    }
    return result("ms", contest(contenders, rounds), dict.fromkeys(contenders, _BATCHES))


def configuration(stage: str, optimizer: str | None = None) -> Config:
    """The configuration of a stage of `experiment=quickstart`, with its own optimizer or another one."""
    recipe: Any = OmegaConf.to_container(OmegaConf.load(experiments()["quickstart"]))
    words = recipe["stages"][stage]
    if optimizer is not None:
        words = [*(word for word in words if not word.startswith("optimizer")), f"optimizer={optimizer}"]
    register_schemas()
    with hydra.initialize(version_base="1.3", config_path="../conf"):
        config = OmegaConf.to_object(hydra.compose("config", overrides=words))
    assert isinstance(config, Config)
    return config


def sequence_steps(config: Config) -> Work:
    """Train a sequence model for a few steps."""
    torch.manual_seed(config.seed)
    template, batches = sequence_batches(config)
    model = build_transformer(transformer_settings(config.model, template.vocabulary)).train()
    model.set_cpu_kernels(training_kernels(config.cpu_kernels, training_options(config)) == CPUKernels.compiled)
    target = template.slots.index(template.target)
    ids = predicted_ids(config.compat, template)

    def loss(batch: SequenceBatch) -> Tensor:
        inputs = with_noise(batch, target, config.sequences.token_noise) if config.sequences.token_noise else None
        given = batch.tokens, batch.positions, batch.weights, batch.slots
        return sequence_loss(model, *given, len(template.slots), ids, inputs).loss

    return _steps(config, _matrices_of_blocks(model), model, [partial(loss, batch) for batch in batches])


def image_steps(config: Config) -> Work:
    """Train an image tokenizer for a few steps, with its codebook in use."""
    torch.manual_seed(config.seed)
    model = build_vqvae(vqvae_settings(config.image_tokenizer)).to(memory_format=torch.channels_last).train()
    samples = open_images(config.data, "train")
    options, size = config.image_tokenizer, config.data.batch_size

    def loss(images_BCYX: Tensor) -> Tensor:
        images = to_unit_range(images_BCYX)
        output = model(images)
        error = reconstruction_loss(options.reconstruction, output.reconstruction, images)
        return error * options.reconstruction_weight + output.quantized.loss

    batches = [torch.stack([samples[some + place].image for place in range(size)]) for some in _starts(size)]
    filters = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    return _steps(config, filters, model, [partial(loss, batch) for batch in batches])


def sequence_batches(config: Config) -> tuple[Template, list[SequenceBatch]]:
    """The layout of a stage and a few of its batches: captions of its data with random codes."""
    samples = open_images(config.data, "train")
    text = TextTokenizer.train([samples.text(index) for index in range(_CAPTIONS)], config.text)
    vocabulary = Vocabulary(config.image_tokenizer.codebook_size, text.vocab_size)
    template = build_template(model_options(config).layout(config.template), vocabulary)
    size = config.data.batch_size
    collate = SequenceCollator(vocabulary.pad)
    return template, [
        collate([_sequence(template, text, samples, some + place) for place in range(size)]) for some in _starts(size)
    ]


def _sequence(template: Template, text: TextTokenizer, samples: CaptionedImages, index: int) -> Any:
    codes = template.vocabulary.codebook_size
    tokens = text.encode(samples.text(index))
    return template.build(
        {
            slot.name: torch.randint(codes, (slot.length,)).numpy() if isinstance(slot, CodeSlot) else tokens
            for slot in template.slots
        }
    )


def _starts(size: int) -> range:
    return range(0, _BATCHES * size, size)


def _matrices_of_blocks(model: Transformer) -> list[nn.Parameter]:
    return model.parameter_groups().matrices


def _steps(
    config: Config, matrices: Sequence[nn.Parameter], model: nn.Module, losses: Sequence[Callable[[], Tensor]]
) -> Work:
    """One step for each loss."""
    inside = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    decay = config.optimizer.weight_decay
    optimizer = optimizer_factory(training_options(config))(
        [
            {"params": list(matrices), "matrices": True, "weight_decay": decay},
            {"params": others, "matrices": False, "weight_decay": decay},
        ]
    )

    def run() -> None:
        for loss in losses:
            optimizer.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
            optimizer.step()

    return run
