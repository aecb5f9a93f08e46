"""The adversarial loss of the image tokenizer (Esser et al. 2021, VQGAN): hinge loss, adaptive weight, regularisation.

Tokenizer and discriminator share one optimizer and one backward pass. The gradient of the tokenizer's term with respect
to the reconstruction is computed here, so it never reaches the discriminator; the discriminator's term gets the
reconstruction detached, so it never reaches the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.vqvae.config import AdversarialConfig, Regularisation
from cogview_pl.vqvae.discriminator import build_discriminator

Join = Callable[[Tensor], Tensor]
"""Mean over the images of this device → mean over the images of all devices; any shape, without gradient."""


class AdversarialTerms(NamedTuple):
    """Scalars of one batch.

    tokenizer: term of the tokenizer, weighted; its gradient reaches the reconstruction and nothing else.
    discriminator: hinge loss plus regularisation; its gradient reaches the discriminator and nothing else.
    figures: name of a metric → its value on this device, without gradient.
    """

    tokenizer: Tensor
    discriminator: Tensor
    figures: dict[str, Tensor]


class AdversarialLoss(nn.Module):
    """The discriminator, and the losses of both networks.

    Buffers: `real_mean` and `made_mean` are moving averages of the logits (LeCam), `updates` counts their updates.
    Buffers do not change in evaluation.
    """

    real_mean: Tensor
    made_mean: Tensor
    updates: Tensor

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        self.config = config
        self.discriminator = build_discriminator(hidden_size=config.hidden_size, layers=config.layers, norm=config.norm)
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("made_mean", torch.zeros(()))
        self.register_buffer("updates", torch.zeros(()))

    def forward(
        self, images: Tensor, reconstruction: Tensor, other_loss: Tensor, last: Tensor, *, join: Join, scale: float
    ) -> AdversarialTerms:
        """Losses of both networks.

        Args:
            images, reconstruction: `(B, 3, Y, X)`, 0 black .. 1 white.
            other_loss: all other losses of the reconstruction; the adaptive weight compares gradients with it.
            last: filters of the decoder's last layer, where gradients are compared.
            join: see `Join`.
            scale: factor of the gradients while they are compared, so that fp16 does not round them to 0.
        """
        options = self.config
        made = reconstruction.detach().requires_grad_()
        real = images.detach().requires_grad_(options.regularisation == Regularisation.r1)
        real_logits, made_logits = self.discriminator(real).float(), self.discriminator(made).float()
        deception = -made_logits.mean()
        (gradient,) = torch.autograd.grad(deception * scale, made, retain_graph=True)
        weight = torch.tensor(options.weight, device=images.device)
        if options.adaptive:
            theirs = torch.autograd.grad(other_loss * scale, last, retain_graph=True)[0]
            ours = torch.autograd.grad(reconstruction, last, gradient, retain_graph=True)[0]
            weight = weight * adaptive_weight(join(theirs), join(ours), options.largest_adaptive_weight)
        tokenizer = weight * _with_gradient(deception.detach(), reconstruction, gradient / scale)
        hinge = hinge_loss(real_logits, made_logits)
        regularisation = self._regularisation(real, real_logits, made_logits, join)
        figures = {
            "tokenizer_loss": deception.detach(),
            "discriminator_loss": hinge.detach(),
            "weight": weight,
            "logit_real": real_logits.detach().mean(),
            "logit_made": made_logits.detach().mean(),
        }
        if options.regularisation != Regularisation.none:
            figures["regularisation"] = regularisation.detach()
        return AdversarialTerms(tokenizer, hinge + options.regularisation_weight * regularisation, figures)

    def _regularisation(self, real: Tensor, real_logits: Tensor, made_logits: Tensor, join: Join) -> Tensor:
        if self.config.regularisation == Regularisation.r1:
            return r1_penalty(real, real_logits)
        if self.config.regularisation == Regularisation.lecam:
            if self.training:
                self._follow(join(torch.stack([real_logits.mean(), made_logits.mean()]).detach()))
            return lecam_penalty(real_logits, made_logits, self.real_mean, self.made_mean)
        return torch.zeros((), device=real.device)

    @torch.no_grad()
    def _follow(self, means: Tensor) -> None:
        """Move the averages; the first ones are plain means, because no value stands for the time before."""
        decay = (self.updates / (self.updates + 1)).clamp(max=self.config.lecam_decay)
        good = means.isfinite().all()
        for average, mean in zip((self.real_mean, self.made_mean), means, strict=True):
            average.copy_(torch.where(good, decay * average + (1 - decay) * mean, average))
        self.updates += good


def hinge_loss(real_logits: Tensor, made_logits: Tensor) -> Tensor:
    """Discriminator's loss: half the sum of mean `max(0, 1 - real)` and mean `max(0, 1 + made)`, a scalar."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + made_logits).mean()) / 2


def lecam_penalty(real_logits: Tensor, made_logits: Tensor, real_mean: Tensor, made_mean: Tensor) -> Tensor:
    """Mean squares of how far logits of real images exceed the average of reconstructions, and the reverse."""
    return F.relu(real_logits - made_mean).square().mean() + F.relu(real_mean - made_logits).square().mean()


def r1_penalty(images: Tensor, logits: Tensor) -> Tensor:
    """Half the mean over images of the squared norm of the gradient of an image's summed logits; differentiable."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean() / 2


def adaptive_weight(of_others: Tensor, of_adversarial: Tensor, largest: float) -> Tensor:
    """Norm of the gradient of the other losses over that of the adversarial loss, at most `largest`: a scalar."""
    smallest = torch.finfo(torch.float32).tiny
    return (of_others.float().norm() / of_adversarial.float().norm().clamp(min=smallest)).clamp(max=largest)


def _with_gradient(value: Tensor, of: Tensor, gradient: Tensor) -> Tensor:
    """`value` as a function of the tensor `of` with this gradient."""
    return value + ((of - of.detach()) * gradient).sum()
