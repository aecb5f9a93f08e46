"""A small feature network that learns from captions which terms belong to an image (multi-label classification).

After Joulin et al. 2016, https://arxiv.org/abs/1511.02251: the words of captions are labels that cost nothing.

Shapes: B images, F features, N captioned images, T terms.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.evaluation.config import FeaturesConfig
from cogview_pl.evaluation.convolutions import ConvolutionalNetwork, worsened


class CaptionNetwork(ConvolutionalNetwork):
    """Maps float images `(B, 3, Y, X)`, 0 … 1, to features `(B, F)` and logits of terms `(B, T)`.

    Args:
        hidden_size, num_features: see `ConvolutionalNetwork`.
        num_terms: T.
    """

    def __init__(self, hidden_size: int, num_features: int, num_terms: int) -> None:
        super().__init__(hidden_size, num_features)
        self.terms = nn.Linear(num_features, num_terms)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of terms."""
        features_BF = self.features_of(images)
        return features_BF, self.terms(features_BF)


class CaptionTraining:
    """Training of a network, batch by batch.

    Args:
        network: it is trained in place.
        options: highest learning rate, augmentation.
        steps: number of steps of the whole training.
        seed: of the augmentation.

    Attributes:
        loss: of the last batch.
    """

    def __init__(self, network: CaptionNetwork, options: FeaturesConfig, *, steps: int, seed: int) -> None:
        self.loss = math.nan
        self._network = network
        self._options = options
        self._random = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(self._optimizer, options.lr, total_steps=steps)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train on a batch of at least two images.

        Args:
            images: uint8 `(B, 3, Y, X)`.
            labels: float 0 or 1, `(B, T)`.
        """
        self._network.train()
        logits_BT = self._network(worsened(images.float() / 255, self._options, self._random))[1]
        loss = F.binary_cross_entropy_with_logits(logits_BT, labels)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        self.loss = loss.item()


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each term: mean, over the images with the term, of the precision down to their rank.

    Args:
        scores: float `(N, T)`; a higher score is an earlier rank.
        labels: 0 or 1, `(N, T)`.

    Returns:
        float64 `(T,)`; NaN for a term without an image.
    """
    ranked = labels.double().gather(0, scores.argsort(dim=0, descending=True, stable=True))
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1, dtype=torch.float64)[:, None]
    return (precision * ranked).sum(0) / ranked.sum(0)


def share_found(scores: Tensor, labels: Tensor) -> float:
    """Share of the terms that are found: those among the k best-scored terms of their image, if it has k terms.

    Args:
        scores: float `(N, T)`.
        labels: 0 or 1, `(N, T)`, some of them 1.
    """
    ranked = labels.gather(1, scores.argsort(dim=1, descending=True, stable=True))
    among = torch.arange(labels.shape[1]) < labels.sum(1, keepdim=True)
    return float(ranked[among].double().sum() / labels.double().sum())
