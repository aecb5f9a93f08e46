"""LightningModule of stage 1: losses, codebook statistics, optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import Dataset
from torchvision.utils import make_grid

from cogview_pl.data.bad_samples import ImageBatch, collate_images
from cogview_pl.kernels.availability import widest_float
from cogview_pl.lit.config import OptimizerConfig
from cogview_pl.lit.optimizers import BuildOptimizer, ParameterGroup, configure_optimizers, log_gradient_norm
from cogview_pl.vqvae.adversarial import AdversarialLoss, Join
from cogview_pl.vqvae.config import AdversarialConfig, Reconstruction
from cogview_pl.vqvae.losses import psnr, reconstruction_loss
from cogview_pl.vqvae.model import VQVAE
from cogview_pl.vqvae.perceptual import PerceptualLoss
from cogview_pl.vqvae.quantizer_base import QuantizerOutput

_MEANS = ("val/loss_reconstruction", "val/loss_commitment", "eval/psnr")
VALIDATION_METRICS = (*_MEANS, "codebook/usage", "codebook/perplexity")
"""Names of the metrics that a validation logs."""
_DISCRIMINATOR = "discriminator"  # group of the optimizer


class ImageTokenizerModule(LightningModule):
    """Trains a VQ-VAE on batches of images.

    Minimises reconstruction loss · `reconstruction_weight` + the quantizer's own loss (paper §3.2), and from a step on
    an adversarial loss too, whose discriminator is trained in the same steps.

    Args:
        model: the VQ-VAE.
        reconstruction: distance between images scaled to 0 … 1.
        reconstruction_weight: factor of the reconstruction loss against the quantizer's.
        quantize_after_steps: first steps, in which the decoder gets the latents unquantized; the codebook then starts
            on trained features. 0 quantizes from the first step.
        adversarial: the discriminator and its losses; None: no adversarial loss.
        perceptual: the perceptual loss; None: there is none.
        optimizer: schedule and weight decay.
        build_optimizer: parameter groups → optimizer.
    """

    def __init__(
        self,
        model: VQVAE,
        *,
        reconstruction: Reconstruction,
        reconstruction_weight: float,
        quantize_after_steps: int,
        adversarial: AdversarialLoss | None = None,
        perceptual: PerceptualLoss | None = None,
        optimizer: OptimizerConfig,
        build_optimizer: BuildOptimizer,
    ) -> None:
        super().__init__()
        self.model = model
        self.reconstruction = reconstruction
        self.reconstruction_weight = reconstruction_weight
        self.quantize_after_steps = quantize_after_steps
        self.adversarial = adversarial
        self.perceptual = perceptual
        self.optimizer_options = optimizer
        self.build_optimizer = build_optimizer
        self._seen = 0  # images since the last step of the optimizer
        self._val_sums: Tensor | None = None
        self._code_counts = torch.zeros(0, dtype=torch.long)
        self.codes_counted = 0
        """Codes of the images of the last validation, on all devices."""

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        """Metrics for the progress bar; the loss of the first steps is the reconstruction alone."""
        quantizes = self.global_step > self.quantize_after_steps
        return ("train/loss", "train/psnr") if quantizes else ("train/loss_reconstruction",)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Loss of one step, averaged over the images of all devices.

        A batch without a readable image on any device has loss 0 and changes no weights.
        """
        count, total = len(batch.images), self._total_count(batch)
        self._seen += total
        if not total:
            return self._nothing()
        # A device without a readable image computes an empty batch, so that the others do not wait for it.
        images = to_unit_range(batch.images if count else batch.images.new_zeros(0, 3, *[self._smallest_edge] * 2))
        share = count * self.trainer.world_size / total
        self.model.quantizer.set_progress(self.global_step / self.trainer.max_steps)
        if self.global_step < self.quantize_after_steps:
            loss, means = self._loss_without_codes(images)
        else:
            loss, means = self._loss(images, join=partial(self._mean_over_devices, count=count, total=total))
        self._log_means(means, count, total)
        return _scaled(loss, share)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Add up the reconstruction metrics of one batch, and count its codes."""
        if self._val_sums is None:
            self._val_sums = torch.zeros(4, device=self.device)
            self._code_counts = torch.zeros(self.model.codebook_size, dtype=torch.long, device=self.device)
        if not len(batch.images):
            return
        images = to_unit_range(batch.images)
        output = self.model(images)
        means = [
            self._reconstruction_loss(output.reconstruction, images),
            output.quantized.commitment,
            psnr(output.reconstruction, images),
            torch.ones((), device=self.device),
        ]
        self._val_sums += torch.stack(means).float() * len(images)
        self._code_counts += torch.bincount(output.quantized.codes.flatten(), minlength=self.model.codebook_size)

    def on_validation_epoch_end(self) -> None:
        """Log means per image, and usage and perplexity of the codebook, over the validation set of all devices."""
        if self._val_sums is None:
            return
        sums, counts = self._total(self._val_sums), self._total(self._code_counts)
        self._val_sums = None
        if sums[-1] == 0:
            return
        self.log_dict(dict(zip(_MEANS, sums[:-1] / sums[-1], strict=True)))
        self.codes_counted = int(counts.sum())
        share = counts.to(widest_float(counts.device)) / counts.sum()
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        self.log("codebook/usage", (counts > 0).float().mean())
        self.log("codebook/perplexity", entropy.exp().float())

    def configure_optimizers(self) -> Any:
        """Optimizer without weight decay: all weights are in small convolutions.

        The discriminator is a group with hyperparameters of its own. Muon does not orthogonalise its gradients.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            ParameterGroup("filters", [p for p in parameters if p.ndim == 4], matrices=True, decay=False),
            ParameterGroup("vectors", [p for p in parameters if p.ndim != 4], matrices=False, decay=False),
        ]
        if self.adversarial is not None:
            own = own_hyperparameters(self.adversarial.config)
            theirs = list(self.adversarial.parameters())
            groups.append(ParameterGroup(_DISCRIMINATOR, theirs, matrices=False, decay=False, own=own))
        return configure_optimizers(self.build_optimizer, self.optimizer_options, groups, self.trainer.max_steps)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log norms of gradients before they are clipped; drop the gradient of a step without images.

        A discriminator that has not started gets no gradient, not even one of 0, so that its optimizer counts no step.
        """
        log_gradient_norm(self, self.model)
        if self.adversarial is not None:
            if self._adversarial_now:
                log_gradient_norm(self, self.adversarial, "adversarial/gradient_norm")
            else:
                self.adversarial.zero_grad()
        if not self._seen:
            optimizer.zero_grad()  # with a gradient of 0, momentum would move the weights
        self._seen = 0

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient of each network by its own norm, so that neither scales the gradient of the other."""
        if self.adversarial is None or gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            for of_discriminator in (False, True):
                groups = [g for g in optimizer.param_groups if (g["name"] == _DISCRIMINATOR) == of_discriminator]
                clip_grad_norm_([p for group in groups for p in group["params"]], gradient_clip_val)

    def _loss_without_codes(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the first steps, and metrics to log."""
        reconstruction = self._reconstruction_loss(self.model.reconstruct_continuous(images), images)
        return reconstruction * self.reconstruction_weight, {"train/loss_reconstruction": reconstruction}

    def _loss(self, images: Tensor, join: Join) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of all networks, and metrics to log; `train/loss` is that of the VQ-VAE."""
        output = self.model(images)
        self._log_codes(output.quantized)
        reconstruction = self._reconstruction_loss(output.reconstruction, images)
        means = {
            "train/loss_reconstruction": reconstruction,
            "train/loss_commitment": output.quantized.commitment,
            "train/psnr": psnr(output.reconstruction.detach(), images),
        }
        of_images = reconstruction * self.reconstruction_weight
        if self.perceptual is not None:
            distance = self.perceptual(images, output.reconstruction)
            of_images = of_images + self.perceptual.weight * distance
            means["train/loss_perceptual"] = distance
        loss = of_images + output.quantized.loss
        if self.adversarial is None or not self._adversarial_now:
            return loss, means | {"train/loss": loss}
        last, scale = self.model.decoder[-1].weight, self._gradient_scale()
        terms = self.adversarial(images, output.reconstruction, of_images, last, join=join, scale=scale)
        loss = loss + terms.tokenizer
        means |= {f"adversarial/{name}": value for name, value in terms.figures.items()}
        return loss + terms.discriminator, means | {"train/loss": loss}

    def _log_codes(self, quantized: QuantizerOutput) -> None:
        """Log how many codes the batch uses."""
        self.log_dict(
            {
                "codebook/batch_usage": quantized.usage,
                "codebook/batch_perplexity": quantized.perplexity,
                "codebook/dead": quantized.dead.float(),
                "codebook/revived": quantized.revived.float(),
            }
        )

    @property
    def _adversarial_now(self) -> bool:
        """Whether the step under way has the adversarial loss."""
        return self.adversarial is not None and self.global_step >= self.adversarial.config.start

    @property
    def _smallest_edge(self) -> int:
        """Edge in pixels of the smallest images that all networks take."""
        edge = 1
        if self.adversarial is not None:
            edge = self.adversarial.discriminator.smallest_edge
        if self.perceptual is not None:
            edge = max(edge, self.perceptual.smallest_edge)
        return -(-edge // self.model.downsampling) * self.model.downsampling

    def _gradient_scale(self) -> float:
        """Factor by which gradients of fp16 keep clear of 0: that of the loss scaler, else 1."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _mean_over_devices(self, mean: Tensor, *, count: int, total: int) -> Tensor:
        """Mean over the images of all devices of a mean over the `count` images of this one."""
        if self.trainer.world_size == 1:
            return mean
        return self._total(mean.nan_to_num() * count) / total

    def _total(self, numbers: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(numbers, reduce_op="sum")  # type: ignore[return-value]

    def _total_count(self, batch: ImageBatch) -> int:
        """Readable images on all devices."""
        if self.trainer.world_size == 1:
            return len(batch.images)
        return int(self._total(torch.tensor(len(batch.images), device=self.device)))

    def _nothing(self) -> Tensor:
        """Loss 0 with gradients 0; on several devices Lightning ends a run that has a step without a loss."""
        return torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0

    def _log_means(self, means: dict[str, Tensor], count: int, total: int) -> None:
        """Log means over `count` images of this device as means over all `total`."""
        if self.trainer.world_size > 1:
            joined = self._mean_over_devices(torch.stack([*means.values()]).detach(), count=count, total=total)
            means = dict(zip(means, joined, strict=True))
        self.log_dict(means)

    def _reconstruction_loss(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        return reconstruction_loss(self.reconstruction, reconstruction, images)


def _scaled(loss: Tensor, share: float) -> Tensor:
    """A device's loss by its share of the images; the mean of no images is not a number, and counts nothing."""
    return loss if share == 1 else loss.nan_to_num() * share


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 images `(B, 3, Y, X)` → float, 0 … 1, in channels-last layout, which is faster for convolutions."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


def own_hyperparameters(config: AdversarialConfig) -> dict[str, Any]:
    """Hyperparameters of the discriminator's group in the optimizer."""
    return {"lr": config.lr} if config.betas is None else {"lr": config.lr, "betas": tuple(config.betas)}


@torch.no_grad()
def reconstruction_grid(model: VQVAE, samples: Dataset[Any], count: int) -> Tensor:
    """One image `(3, Y, X)`, 0 … 1, on the CPU: the first `count` readable samples above their reconstructions."""
    batch = collate_images([samples[index] for index in range(min(count, len(samples)))])  # type: ignore[arg-type]
    if not len(batch.images):
        return torch.zeros(3, 1, 1)
    device = next(model.parameters()).device
    images = to_unit_range(batch.images).to(device)
    decoded = model.decode(model.encode(images)).clamp(0, 1)
    return make_grid(torch.cat([images, decoded]), nrow=len(images)).cpu()
