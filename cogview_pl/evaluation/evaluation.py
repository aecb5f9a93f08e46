"""All wanted metrics of one evaluation, with the protocol that they depend on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from cogview_pl.checkpoints.model_folder import ImageTokenizer
from cogview_pl.data.bad_samples import ImageBatch
from cogview_pl.evaluation.config import EvaluateConfig
from cogview_pl.evaluation.features import RESIZE_FILTER, FeatureNetwork, Features
from cogview_pl.evaluation.image_files import ImageFiles
from cogview_pl.evaluation.lpips import LPIPS
from cogview_pl.evaluation.measure import Images, Reader, View, view
from cogview_pl.evaluation.metrics import FID, Comparison, ReconstructionMetrics, inception_score
from cogview_pl.evaluation.protocol import PROTOCOL, digest_of_prompts, digest_of_weights
from cogview_pl.evaluation.requirements import require_enough
from cogview_pl.generation.codes import encode_images
from cogview_pl.generation.rerank import Captioner
from cogview_pl.toy_world.accuracy import AttributeAccuracy, StyleAccuracy

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tools:
    """Everything that the wanted metrics need, opened and checked; None where no metric asks for it."""

    network: FeatureNetwork | None
    tokenizer: ImageTokenizer | None
    captioner: Captioner | None
    captioner_codes: ImageTokenizer | None
    """The image tokenizer that the captioner was trained with."""
    reference: Images | None
    lpips: LPIPS | None

    @property
    def num_reference(self) -> int | None:
        """Number of real images."""
        return None if self.reference is None else len(self.reference)


@dataclass(frozen=True)
class Candidates:
    """The generated images to be judged."""

    files: list[Path]
    prompts: list[str]
    """One per image, empty where `images` names them."""


@dataclass(frozen=True)
class Reference:
    """Real images that were read."""

    count: int
    sha256: str
    """Of their pixels, in order."""


@dataclass(frozen=True)
class Evaluation:
    """Measures metrics of generated images, and of the image tokenizer.

    Attributes:
        options: group of the configuration.
        wanted: metrics.
        tools: networks and data that they need.
        image_size: edge of the images in pixels.
        seed: of the parts that IS is taken over.
        batch_size: images that the captioner scores at once.
    """

    options: EvaluateConfig
    wanted: set[str]
    tools: Tools
    image_size: int
    seed: int
    batch_size: int

    def measure(self, candidates: Candidates, reader: Reader) -> dict[str, float | str]:
        """Metrics of generated images, and under `protocol/` the values that they depend on.

        Empty in all processes but the first.

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
        if self.tools.captioner is not None and self.tools.captioner_codes is not None:
            metrics["eval/caption_loss"] = self._caption_loss(
                self.tools.captioner, self.tools.captioner_codes, candidates, reader
            )
        if not reader.team.first:
            return {}
        metrics |= {f"eval/fid_{radius:g}": fid.compute() for radius, fid in fids.items()}
        if network is not None and fids:
            _warn_of_few(network, real, generated)
        return metrics | {f"{PROTOCOL}{key}": value for key, value in self._protocol(real, generated).items()}

    def _reference(
        self, images: Images, reader: Reader, network: FeatureNetwork, fids: Mapping[float, FID]
    ) -> tuple[Reference, dict[str, float]]:
        """Real images, and metrics of their reconstructions."""
        reconstruction = None
        if self.tools.tokenizer is not None:
            reconstruction = ReconstructionMetrics(self.tools.tokenizer.model.to(network.device), self.tools.lpips)
        rfid = FID(network.num_features)
        digest, count = hashlib.sha256(), 0

        def look(batch: ImageBatch) -> tuple[View, tuple[Features, Comparison] | None]:
            if reconstruction is None:
                return view(batch, network, fids), None
            decoded, comparison = reconstruction.compare(batch.images.float() / 255)
            return view(batch, network, fids), (network(decoded), comparison)

        for seen, compared in reader.each(images, "reference", look):
            digest.update(seen.images.numpy().tobytes())
            count += len(seen.images)
            for radius, fid in fids.items():
                fid.add_real(seen.features[radius].features)
            if reconstruction is not None and compared is not None:
                rfid.add_real(seen.features[0].features)
                rfid.add_generated(compared[0].features)
                reconstruction.add(compared[1])
        if not reader.team.first:
            return Reference(0, ""), {}
        require_enough(self.wanted & {"reconstruction"}, self.options.is_splits, 0, count)
        metrics = {} if reconstruction is None else {**reconstruction.compute(), "eval/rfid": rfid.compute()}
        return Reference(count, digest.hexdigest()), metrics

    def _generated(
        self, candidates: Candidates, reader: Reader, fids: Mapping[float, FID], num_real: int | None
    ) -> tuple[list[str], dict[str, float]]:
        """Prompts of the generated images that were read, and metrics of these images alone."""
        network = self.tools.network
        attributes = AttributeAccuracy(self.image_size) if "toy" in self.wanted else None
        style = None
        if "style" in self.wanted and network is not None and network.classes is not None:
            style = StyleAccuracy(network.classes, self.options.base_style)
        images = ImageFiles(candidates.files, candidates.prompts, self.image_size)
        prompts: list[str] = []
        logits: list[Tensor] = []
        for seen in reader.each(images, "generated", lambda batch: view(batch, network, fids)):
            prompts += seen.prompts
            for radius, fid in fids.items():
                fid.add_generated(seen.features[radius].features)
            if seen.features and seen.features[0].logits is not None:
                logits.append(seen.features[0].logits)
                if style is not None:
                    style.add(logits[-1], seen.prompts)
            if attributes is not None:
                attributes.add(seen.images, seen.prompts)
        if not reader.team.first:
            return [], {}
        require_enough(self.wanted, self.options.is_splits, len(prompts), num_real)
        metrics: dict[str, float] = {}
        for judge in (attributes, style):
            metrics |= judge.compute() if judge else {}
        if "is" in self.wanted:
            metrics["eval/is"] = inception_score(torch.cat(logits), self.options.is_splits, self.seed)
        return prompts, metrics

    def _caption_loss(
        self, captioner: Captioner, tokenizer: ImageTokenizer, candidates: Candidates, reader: Reader
    ) -> float:
        images = ImageFiles(candidates.files, candidates.prompts, tokenizer.settings["image_size"])

        def score(batch: ImageBatch) -> list[float]:
            codes = encode_images(list(batch.images), tokenizer.model, self.batch_size)
            return captioner.losses(batch.texts, codes, self.batch_size)

        losses = [loss for part in reader.each(images, "caption loss", score) for loss in part]
        return fmean(losses) if reader.team.first else 0.0

    def _protocol(self, real: Reference | None, generated: list[str] | None) -> dict[str, float | str]:
        """Values that the numbers depend on, besides the generator: those of two protocols cannot be compared."""
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
            found["generated_images"] = len(generated)
            if any(generated):
                found["prompts_sha256"] = digest_of_prompts(generated)
        return found


def _warn_of_few(network: FeatureNetwork, real: Reference | None, generated: list[str] | None) -> None:
    fewest = min(real.count if real else 0, len(generated or ()))
    if fewest <= network.num_features:
        _log.warning(
            "FID: %d images for %d features; the smaller the number, the larger the bias. Compare equal numbers only",
            fewest,
            network.num_features,
        )
