"""Small models of both stages as Lightning trains them, and batches for them; always the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from cogview_pl.data.bad_samples import ImageBatch, collate_images
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.data.sequence_dataset import SequenceBatch
from cogview_pl.evaluation.feature_distance import FeatureDistance
from cogview_pl.lit.config import OptimizerConfig
from cogview_pl.lit.image_tokenizer import ImageTokenizerModule
from cogview_pl.lit.sequence_model import SequenceModule
from cogview_pl.vqvae.adversarial import AdversarialLoss
from cogview_pl.vqvae.config import AdversarialConfig, DiscriminatorNorm, Reconstruction, Regularisation
from cogview_pl.vqvae.model import VQVAE
from cogview_pl.vqvae.perceptual import PerceptualLoss
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


def adversarial_options(**changed: Any) -> AdversarialConfig:
    """Options of a small discriminator for images of 8 x 8, from the first step on."""
    options: dict[str, Any] = {
        "start": 0,
        "weight": 0.7,
        "adaptive": True,
        "largest_adaptive_weight": 1e4,
        "hidden_size": 4,
        "layers": 1,
        "norm": DiscriminatorNorm.group,
        "regularisation": Regularisation.lecam,
        "regularisation_weight": 0.3,
        "lecam_decay": 0.9,
        "lr": 0.05,
        "betas": None,
    }
    return AdversarialConfig(**{**options, **changed})


def discriminated(**changed: Any) -> AdversarialLoss:
    """A discriminator whose logits lie on both sides of the margins, so that all parts of its loss count."""
    torch.manual_seed(5)
    made = AdversarialLoss(adversarial_options(**changed))
    with torch.no_grad():
        for parameter in made.discriminator.parameters():
            parameter.mul_(20) if parameter.ndim == 4 else parameter.add_(0.1 * torch.randn(parameter.shape))
        made.discriminator.layers[-1].bias.add_(3)
    return made


def perceptual_loss() -> PerceptualLoss:
    """With a network of two convolutions that has a batch norm."""
    torch.manual_seed(6)
    layers = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()),
        *(torch.nn.Conv2d(4, 6, 3), torch.nn.ReLU()),
    )
    distance = FeatureDistance(layers, {2: 4, 4: 6}, mean=[0.1, 0.0, -0.1], deviation=[0.5, 0.6, 0.7])
    distance.weigh_channels_equally()
    distance.weigh_layers([1.0, 0.5])
    return PerceptualLoss(distance, weight=1.5, smallest_edge=6)


def tokenizer_module(
    kind: str = "learned",
    reconstruction: Any = "l2",
    quantize_after_steps: int = 0,
    adversarial: AdversarialLoss | None = None,
    perceptual: PerceptualLoss | None = None,
    build_optimizer: Any = None,
) -> ImageTokenizerModule:
    return ImageTokenizerModule(
        tokenizer(kind),
        reconstruction=Reconstruction(reconstruction),
        reconstruction_weight=RECONSTRUCTION_WEIGHT,
        quantize_after_steps=quantize_after_steps,
        optimizer=OptimizerConfig(weight_decay=0.5, warmup=0.0, final_lr=1.0),
        adversarial=adversarial,
        perceptual=perceptual,
        build_optimizer=build_optimizer or partial(torch.optim.SGD, lr=TOKENIZER_LR, momentum=MOMENTUM),
    )


def images(seed: int, count: int) -> list[ImageSample]:
    """Images of 8 x 8, the later ones darker."""
    random = torch.Generator().manual_seed(seed)
    tops = [256 - 40 * number for number in range(count)]
    return [ImageSample(str(top), torch.randint(top, (3, 8, 8), generator=random).byte(), "") for top in tops]


def image_batch(seed: int, count: int) -> ImageBatch:
    return collate_images([Skipped("lost", "why"), *images(seed, count)])
