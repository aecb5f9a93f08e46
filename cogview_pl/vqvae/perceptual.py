"""The perceptual loss of the image tokenizer: distance of feature maps of a network that is not trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class PerceptualLoss(nn.Module):
    """Mean distance of images from their reconstructions, a scalar.

    Its network stays in evaluation, gets no gradients, and is in no checkpoint: each run reads it from its file.

    Args:
        distance: maps two batches of images `(B, 3, Y, X)`, 0 black .. 1 white, to distances `(B,)`.
        weight: factor of the loss, for the trainer.
        smallest_edge: edge of the smallest images in pixels.
    """

    def __init__(self, distance: nn.Module, *, weight: float, smallest_edge: int) -> None:
        super().__init__()
        self.distance = distance.requires_grad_(False).eval()
        self.weight = weight
        self.smallest_edge = smallest_edge
        self.register_state_dict_post_hook(_without_network)
        self.register_load_state_dict_post_hook(_expect_no_network)

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stay in evaluation."""
        return super().train(False)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """The unweighted loss, in float32."""
        distance: Tensor = self.distance(images, reconstruction)
        return distance.float().mean()


def _without_network(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}distance.")]:
        del state[name]


def _expect_no_network(module: nn.Module, incompatible: Any) -> None:
    own = {f"distance.{name}" for name in dict(module.distance.state_dict())}  # type: ignore[union-attr, operator]
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not any(name == one or name.endswith(f".{one}") for one in own)]
