"""Small models of both stages as Lightning trains them, and batches for them; always the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from cogview_pl.data.bad_samples import ImageBatch, collate_images
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.data.sequence_dataset import SequenceBatch
from cogview_pl.lit.config import OptimizerConfig
from cogview_pl.lit.image_tokenizer import ImageTokenizerModule
from cogview_pl.lit.sequence_model import SequenceModule
from cogview_pl.vqvae.config import Reconstruction
from cogview_pl.vqvae.model import VQVAE
from tests.make_models import make_transformer, make_vqvae

TEXT, IMAGE = range(12), range(12, 30)
SLOT_IDS = [TEXT, IMAGE, range(30, 31)]
NAMES = ["text", "image", "unused"]
LR, DECAY = 0.5, 0.02


def sequence_module(slot_ids: list[range] | None = SLOT_IDS, noise: float = 0.0, trained: str = "") -> SequenceModule:
    """A model; it trains the parameters that have `trained` in their names."""
    torch.manual_seed(0)
    model = make_transformer(vocab_size=31, num_layers=1, hidden_size=8, num_heads=2, num_positions=12, init_std=0.4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    return SequenceModule(
        model,
        slot_names=NAMES,
        slot_ids=slot_ids,
        target=1,
        token_noise=noise,
        optimizer=OptimizerConfig(weight_decay=DECAY, warmup=0.0, final_lr=1.0),
        build_optimizer=partial(torch.optim.SGD, lr=LR),
        generator=None,
        val_prompts=[],
    )


def sequence_batch(seed: int, rows: int, text: int, image: int, text_weight: float = 0.5) -> SequenceBatch:
    """Rows of a command, a text and an image; the first row ends in two tokens of padding."""
    random = torch.Generator().manual_seed(seed)
    command = torch.full((rows, 1), 30)
    texts, images = (
        torch.randint(ids.start, ids.stop, (rows, n), generator=random) for ids, n in ((TEXT, text), (IMAGE, image))
    )
    tokens = torch.cat([command, texts, images], 1)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    slots = torch.tensor([-1] + [0] * text + [1] * image).repeat(rows, 1)
    weights = torch.where(slots == 0, text_weight, 2.0) * torch.rand(slots.shape, generator=random)
    weights[slots == -1] = 0
    weights[:, 0] = 1  # nothing predicts it
    weights[0, -2:] = 0
    slots[0, -2:] = -1
    return SequenceBatch(tokens, positions, weights, slots)


CODES, RECONSTRUCTION_WEIGHT = 12, 3.0
TOKENIZER_LR, MOMENTUM = 0.02, 0.9


def tokenizer(kind: str = "learned") -> VQVAE:
    torch.manual_seed(3)
    made = make_vqvae(
        kind,
        hidden_size=6,
        codebook_dim=3,
        codebook_size=CODES,
        downsampling=4,
        mean=[0.5, 0.4, 0.6],
        std=[0.5, 0.6, 0.4],
        quantizer={"kmeans_iters": 0} if kind == "ema" else {},
    )
    with torch.no_grad():  # so that images take several codes, and their reconstructions leave 0 … 1
        made.decoder[-1].weight *= 6
        made.decoder[-1].bias.copy_(torch.tensor([1.5, -0.6, 0.1]))
        made.quantizer.codebook.copy_(made.latents(torch.rand(3, 3, 8, 8)).transpose(0, 1).flatten(1))
    return made


def tokenizer_module(
    kind: str = "learned", reconstruction: Any = "l2", quantize_after_steps: int = 0
) -> ImageTokenizerModule:
    return ImageTokenizerModule(
        tokenizer(kind),
        reconstruction=Reconstruction(reconstruction),
        reconstruction_weight=RECONSTRUCTION_WEIGHT,
        quantize_after_steps=quantize_after_steps,
        optimizer=OptimizerConfig(weight_decay=0.5, warmup=0.0, final_lr=1.0),
        build_optimizer=partial(torch.optim.SGD, lr=TOKENIZER_LR, momentum=MOMENTUM),
    )


def images(seed: int, count: int) -> list[ImageSample]:
    """Images of 8 x 8, the later ones darker."""
    random = torch.Generator().manual_seed(seed)
    tops = [256 - 40 * number for number in range(count)]
    return [ImageSample(str(top), torch.randint(top, (3, 8, 8), generator=random).byte(), "") for top in tops]


def image_batch(seed: int, count: int) -> ImageBatch:
    return collate_images([Skipped("lost", "why"), *images(seed, count)])
