"""Measures all wanted metrics of an evaluation, and records their protocol."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from cogview_pl.checkpoints.model_folder import ImageTokenizer
from cogview_pl.evaluation.config import EvaluateConfig
from cogview_pl.evaluation.features import RESIZE_FILTER, FeatureNetwork
from cogview_pl.evaluation.image_files import ImageFiles
from cogview_pl.evaluation.lpips import LPIPS
from cogview_pl.evaluation.measure import Generated, Images, Reader, Reference, measure_generated, measure_reference
from cogview_pl.evaluation.metrics import FID, ReconstructionMetrics, inception_score
from cogview_pl.evaluation.protocol import PROTOCOL, digest_of_prompts, digest_of_weights
from cogview_pl.evaluation.requirements import require_enough
from cogview_pl.generation.codes import encode_images
from cogview_pl.generation.rerank import Captioner
from cogview_pl.toy_world.accuracy import AttributeAccuracy, StyleAccuracy

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tools:
    """Networks and data of the wanted metrics, opened and checked; None if no metric needs them."""

    network: FeatureNetwork | None
    tokenizer: ImageTokenizer | None
    captioner: Captioner | None
    captioner_codes: ImageTokenizer | None
    """Image tokenizer of the captioner."""
    reference: Images | None
    lpips: LPIPS | None

    @property
    def num_reference(self) -> int | None:
        """Number of real images; None without reference."""
        return None if self.reference is None else len(self.reference)


@dataclass(frozen=True)
class Candidates:
    """The generated images to evaluate."""

    files: list[Path]
    prompts: list[str]
    """One prompt per image, empty for files of `images`."""


@dataclass(frozen=True)
class Evaluation:
    """Measures metrics of generated images, and of the image tokenizer.

    Attributes:
        options: group `evaluate` of the configuration.
        wanted: names of the metrics to measure.
        tools: networks and data of these metrics.
        image_size: edge of the images in pixels.
        seed: seed of the random parts of IS.
        batch_size: number of images that the captioner scores at once.
    """

    options: EvaluateConfig
    wanted: set[str]
    tools: Tools
    image_size: int
    seed: int
    batch_size: int

    def measure(self, candidates: Candidates, reader: Reader) -> dict[str, float | str]:
        """Metrics, and under `protocol/` the values that they depend on.

        Raises:
            UserError: too few images can be read.
        """
        network, wanted = self.tools.network, self.wanted
        fids = {r: FID(network.num_features) for r in self.options.blur} if network and "fid" in wanted else {}
        metrics: dict[str, float | str] = {}
        real = generated = None
        if self.tools.reference is not None and network is not None:
            real, found = self._reference(self.tools.reference, reader, network, fids)
            metrics |= found
        if candidates.files:
            generated, found = self._generated(candidates, reader, fids, real.count if real else None)
            metrics |= found
        metrics |= {f"eval/fid_{radius:g}": fid.compute() for radius, fid in fids.items()}
        if self.tools.captioner is not None and self.tools.captioner_codes is not None:
            metrics["eval/caption_loss"] = self._caption_loss(
                self.tools.captioner, self.tools.captioner_codes, candidates, reader
            )
        if network is not None and fids:
            _warn_of_few(network, real, generated)
        return metrics | {f"{PROTOCOL}{key}": value for key, value in self._protocol(real, generated).items()}

    def _reference(
        self, images: Images, reader: Reader, network: FeatureNetwork, fids: Mapping[float, FID]
    ) -> tuple[Reference, dict[str, float]]:
        """Number and hash of the real images, and metrics of their reconstructions."""
        reconstruction = None
        if self.tools.tokenizer is not None:
            reconstruction = ReconstructionMetrics(self.tools.tokenizer.model.to(network.device), self.tools.lpips)
        rfid = FID(network.num_features)
        seen = measure_reference(images, reader, network=network, fids=fids, reconstruction=reconstruction, rfid=rfid)
        require_enough(self.wanted & {"reconstruction"}, self.options.is_splits, 0, seen.count)
        return seen, {} if reconstruction is None else {**reconstruction.compute(), "eval/rfid": rfid.compute()}

    def _generated(
        self, candidates: Candidates, reader: Reader, fids: Mapping[float, FID], num_real: int | None
    ) -> tuple[Generated, dict[str, float]]:
        """Prompts and logits of the generated images, and the metrics that need no real images."""
        network = self.tools.network
        attributes = AttributeAccuracy(self.image_size) if "toy" in self.wanted else None
        style = None
        if "style" in self.wanted and network is not None and network.classes is not None:
            style = StyleAccuracy(network.classes, self.options.base_style)
        images = ImageFiles(candidates.files, candidates.prompts, self.image_size)
        seen = measure_generated(images, reader, network=network, fids=fids, attributes=attributes, style=style)
        require_enough(self.wanted, self.options.is_splits, len(seen.prompts), num_real)
        metrics: dict[str, float] = {}
        for judge in (attributes, style):
            metrics |= judge.compute() if judge else {}
        if "is" in self.wanted:
            metrics["eval/is"] = inception_score(torch.cat(seen.logits), self.options.is_splits, self.seed)
        return seen, metrics

    def _caption_loss(
        self, captioner: Captioner, tokenizer: ImageTokenizer, candidates: Candidates, reader: Reader
    ) -> float:
        images = ImageFiles(candidates.files, candidates.prompts, tokenizer.settings["image_size"])
        losses: list[float] = []
        for batch in reader.batches(images, "caption loss"):
            codes = encode_images(list(batch.images), tokenizer.model, self.batch_size)
            losses += captioner.losses(batch.texts, codes, self.batch_size)
        return fmean(losses)

    def _protocol(self, real: Reference | None, generated: Generated | None) -> dict[str, float | str]:
        """Values that metrics depend on, besides the generator; metrics with different protocols are not comparable."""
        tools, options = self.tools, self.options
        found: dict[str, float | str] = {"image_size": self.image_size, "seed": self.seed}
        if tools.network is not None:
            found |= {
                "features_sha256": tools.network.sha256,
                "resolution": tools.network.resolution,
                "resize_filter": RESIZE_FILTER,
            }
        if "fid" in self.wanted:
            found["blur_radii"] = ",".join(f"{radius:g}" for radius in options.blur)
        if "is" in self.wanted:
            found["is_splits"] = options.is_splits
        if tools.lpips is not None:
            found["lpips_sha256"] = tools.lpips.sha256
        if "style" in self.wanted:
            found["base_style"] = options.base_style
        if tools.captioner is not None:
            found["captioner_sha256"] = digest_of_weights(tools.captioner.model)
        if real is not None:
            found |= {"reference_images": real.count, "reference_sha256": real.sha256}
        if generated is not None:
            found["generated_images"] = len(generated.prompts)
            if any(generated.prompts):
                found["prompts_sha256"] = digest_of_prompts(generated.prompts)
        return found


def _warn_of_few(network: FeatureNetwork, real: Reference | None, generated: Generated | None) -> None:
    fewest = min(real.count if real else 0, len(generated.prompts) if generated else 0)
    if fewest <= network.num_features:
        _log.warning(
            "FID: %d images for %d features; the smaller the number, the larger the bias. Compare equal numbers only",
            fewest,
            network.num_features,
        )
