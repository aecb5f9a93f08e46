"""task=evaluate: numbers on images that exist or are painted first, with the protocol that they depend on."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch

from cogview_pl.assembly.image_data import open_images
from cogview_pl.assembly.model_specs import plain
from cogview_pl.assembly.models import inference_device, open_image_tokenizer, open_sequence_model
from cogview_pl.checkpoints.model_folder import ImageTokenizer
from cogview_pl.config.schema import Config
from cogview_pl.data.bad_samples import SkipLog
from cogview_pl.data.images import find_images
from cogview_pl.errors import UserError
from cogview_pl.evaluation.config import EvaluateConfig
from cogview_pl.evaluation.features import RESIZE_FILTER, FeatureNetwork, open_features
from cogview_pl.evaluation.image_files import ImageFiles
from cogview_pl.evaluation.lpips import KEY as LPIPS_KEY
from cogview_pl.evaluation.lpips import LPIPS, SMALLEST, open_lpips
from cogview_pl.evaluation.measure import (
    Generated,
    Images,
    Reader,
    Reference,
    measure_generated,
    measure_reference,
)
from cogview_pl.evaluation.metrics import FID, ReconstructionMetrics, inception_score
from cogview_pl.evaluation.protocol import compare, digest_of_prompts, digest_of_weights, table
from cogview_pl.generation.rerank import Captioner
from cogview_pl.runs.image_files import image_files, pairs_file, read_pairs
from cogview_pl.runs.run_folder import SAMPLES, Metrics, RunFolder, predecessor, require_metrics
from cogview_pl.tasks.generate import open_generator, paint, ready_to_paint, save_sheet
from cogview_pl.tasks.generate_captions import encode
from cogview_pl.toy_world.accuracy import AttributeAccuracy, StyleAccuracy, asked_style, names_objects
from cogview_pl.toy_world.captions import STYLES
from cogview_pl.vocab import TextSlot

_log = logging.getLogger(__name__)

METRICS = ("reconstruction", "fid", "is", "caption_loss", "toy", "style")
_WITH_NETWORK = {"reconstruction", "fid", "is", "style"}
_WITH_REFERENCE = {"reconstruction", "fid"}
_WITH_PROMPTS = ("caption_loss", "toy", "style")
_SETTINGS_WITHOUT_EFFECT = {"batch_size", "cuda_graphs"}  # of the sampler, on the images


@dataclass(frozen=True)
class Tools:
    """Everything that the wanted metrics need, opened and checked; None where none asks for it."""

    network: FeatureNetwork | None
    tokenizer: ImageTokenizer | None
    captioner: Captioner | None
    captioner_codes: ImageTokenizer | None
    """The image tokenizer that the captioner was trained with."""
    reference: Images | None
    lpips: LPIPS | None

    @property
    def num_reference(self) -> int | None:
        """How many real images there are."""
        return None if self.reference is None else len(self.reference)


@dataclass(frozen=True)
class Candidates:
    """The generated images to be judged."""

    files: list[Path]
    prompts: list[str]
    """One per image, empty where `images` names them."""


def run(config: Config, folder: RunFolder) -> Metrics:
    """Measure what `evaluate.metrics` lists, or compare two evaluations."""
    options = config.evaluate
    assert options is not None
    if options.compare is not None:
        for path in options.compare:
            require_metrics(Path(path))
        found = compare(options.compare)
        print(table(found))
        return found
    wanted = _wanted(options)
    tools = _open_tools(config, options, wanted)
    candidates = _generated_images(config, options, wanted, tools, folder)
    started = time.perf_counter()
    metrics = _measure(config, options, wanted, tools, candidates, folder)
    metrics["perf/evaluate_s"] = round(time.perf_counter() - started, 1)
    return metrics


def _wanted(options: EvaluateConfig) -> set[str]:
    unknown = [name for name in options.metrics if name not in METRICS]
    if unknown or not options.metrics:
        found = f"unknown metric {unknown[0]!r}" if unknown else "found none"
        raise UserError(f"evaluate.metrics: {found}; use some of {', '.join(METRICS)}")
    if "fid" in options.metrics and not options.blur:
        raise UserError("evaluate.blur: found no radius; FID needs one at least, 0 for no blur")
    wrong = [radius for radius in options.blur if not (radius >= 0 and math.isfinite(radius))]
    if wrong:
        raise UserError(f"evaluate.blur: found {wrong[0]}; a radius is at least 0")
    if options.lpips is not None and "reconstruction" not in options.metrics:
        raise UserError(f"{LPIPS_KEY} is measured on reconstructions; add reconstruction to evaluate.metrics")
    return set(options.metrics)


# --- what the metrics need ------------------------------------------------------------------------


def _open_tools(config: Config, options: EvaluateConfig, wanted: set[str]) -> Tools:
    device, _ = inference_device(config)
    network = _open_network(config, options, wanted, device) if wanted & _WITH_NETWORK else None
    captioner, codes = _open_captioner(config) if "caption_loss" in wanted else (None, None)
    return Tools(
        network=network,
        tokenizer=_open_tokenizer(config) if "reconstruction" in wanted else None,
        captioner=captioner,
        captioner_codes=codes,
        reference=_open_reference(config, options) if wanted & _WITH_REFERENCE else None,
        lpips=_open_lpips(config, options.lpips, device) if options.lpips is not None else None,
    )


def _open_network(config: Config, options: EvaluateConfig, wanted: set[str], device: str) -> FeatureNetwork:
    path = predecessor(config.outputs, "features", "evaluate.features", options.features)
    network = open_features(
        path,
        device=device,
        resolution=options.resolution,
        trust=options.trust_features,
        verify=config.verify,
    )
    if "is" in wanted and network.num_classes is None:
        raise UserError(f"evaluate.features={path} gives no logits, which is needs; leave it out of evaluate.metrics")
    if "style" in wanted:
        known = set(network.classes or ())
        if not known or not known <= set(STYLES):
            raise UserError(
                f"evaluate.features={path} does not know the styles of the toy world, which style needs; give a run "
                "of task=features, or leave it out of evaluate.metrics"
            )
        if options.base_style not in known:
            raise UserError(f"evaluate.base_style={options.base_style}: the network knows {', '.join(sorted(known))}")
    return network


def _open_tokenizer(config: Config) -> ImageTokenizer:
    path = predecessor(config.outputs, "vqvae", "image_tokenizer.path", config.image_tokenizer.path)
    tokenizer = open_image_tokenizer(config, path, "image_tokenizer.path")
    size = tokenizer.settings["image_size"]
    if config.data.image_size != size:
        raise UserError(
            f"data.image_size={config.data.image_size}: the image tokenizer was trained on {size} pixels; set "
            f"data.image_size={size}, or leave reconstruction out of evaluate.metrics"
        )
    return tokenizer


def _open_lpips(config: Config, files: list[str], device: str) -> LPIPS:
    if config.data.image_size < SMALLEST:
        raise UserError(f"{LPIPS_KEY} needs images of {SMALLEST} pixels, data.image_size={config.data.image_size}")
    return open_lpips(files, device=device, verify=config.verify)


def _open_captioner(config: Config) -> tuple[Captioner, ImageTokenizer]:
    path = predecessor(config.outputs, "caption", "rerank_with", config.rerank_with)
    loaded = open_sequence_model(config, path, "rerank_with", config.rerank_template)
    return Captioner(loaded, *inference_device(config)), loaded.image_tokenizer


def _open_reference(config: Config, options: EvaluateConfig) -> Images:
    if options.reference is None:
        return open_images(config.data, "val")
    root = Path(options.reference)
    files = list(find_images(root)) if root.is_dir() else []
    if not files:
        raise UserError(f"evaluate.reference={root} holds no images; give a folder of real images")
    return ImageFiles(files, [""] * len(files), config.data.image_size)


# --- generated images ---------------------------------------------------------------------------


def _generated_images(
    config: Config, options: EvaluateConfig, wanted: set[str], tools: Tools, folder: RunFolder
) -> Candidates:
    """Those that the user names, or painted now; whatever could be wrong is checked before painting starts."""
    if wanted <= {"reconstruction"}:
        _require_enough(options, wanted, 0, tools.num_reference)
        return Candidates([], [])
    given = [key for key in ("pairs", "images", "prompts") if getattr(config, key) is not None]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} both name what to evaluate; give one of them")
    if config.pairs is None and config.images is None:
        pipeline, prompts = ready_to_paint(config, open_generator(config))
        kept = min(config.top_n or config.num_images_per_prompt, config.num_images_per_prompt)
        _check_prompts(options, wanted, tools, prompts)
        _require_enough(options, wanted, len(prompts) * kept, tools.num_reference)
        save_sheet(config, folder, prompts, paint(config, folder, pipeline, prompts))
        return _listed(folder / SAMPLES)
    if config.pairs is not None:
        candidates = _listed(pairs_file(Path(config.pairs)))
        _check_prompts(options, wanted, tools, candidates.prompts)
    else:
        _refuse_prompts(config, wanted)
        files = image_files(config.images)
        candidates = Candidates(files, [""] * len(files))
    _require_enough(options, wanted, sum(file.is_file() for file in candidates.files), tools.num_reference)
    return candidates


def _refuse_prompts(config: Config, wanted: set[str]) -> None:
    without = [name for name in _WITH_PROMPTS if name in wanted]
    if without:
        raise UserError(
            f"evaluate.metrics: {without[0]} needs prompts, and images={config.images} has none; give pairs, or "
            f"leave out {', '.join(without)}"
        )


def _listed(file: Path) -> Candidates:
    pairs = read_pairs(file)
    return Candidates([file.parent / pair["file"] for pair in pairs], [pair["prompt"] for pair in pairs])


def _check_prompts(options: EvaluateConfig, wanted: set[str], tools: Tools, prompts: list[str]) -> None:
    """Raises UserError for a prompt that the captioner cannot take, and for prompts that a metric cannot judge."""
    if tools.captioner is not None:
        slot = tools.captioner.template.target
        assert isinstance(slot, TextSlot)
        for prompt in prompts:
            text_tokens = len(tools.captioner.text.encode(prompt))
            if text_tokens > slot.length:
                raise UserError(
                    f"evaluate.metrics: caption_loss of {prompt[:40]!r}: it has {text_tokens} text tokens, the "
                    f"captioner in rerank_with holds {slot.length}; shorten it"
                )
    if "toy" in wanted and not any(map(names_objects, prompts)):
        raise UserError(
            "evaluate.metrics: toy needs prompts that name colour, shape, size and place of objects, and none of the "
            f"{len(prompts)} does; leave it out"
        )
    if "style" in wanted and not any(asked_style(prompt, options.base_style) for prompt in prompts):
        raise UserError(
            "evaluate.metrics: style needs prompts that name a style or objects of the toy world, and none of the "
            f"{len(prompts)} does; leave it out"
        )


def _require_enough(options: EvaluateConfig, wanted: set[str], generated: int, real: int | None) -> None:
    """Raises UserError where there are too few images for a wanted metric."""
    needs = {
        "reconstruction": (0, 2),  # a covariance needs two
        "fid": (2, 2),
        "is": (options.is_splits, 0),
    }
    for name in METRICS:
        if name not in wanted:
            continue
        least, least_real = needs.get(name, (1, 0))
        if generated < least:
            raise UserError(
                f"evaluate.metrics: {name} needs {least} generated images at least, and {generated} can be read; "
                "give more in pairs, images or prompts"
            )
        if real is not None and real < least_real:
            raise UserError(
                f"evaluate.metrics: {name} needs {least_real} reference images at least, and {real} can be read; "
                "give more in evaluate.reference or the validation split"
            )


# --- measuring ------------------------------------------------------------------------------------


def _measure(
    config: Config, options: EvaluateConfig, wanted: set[str], tools: Tools, candidates: Candidates, folder: RunFolder
) -> dict[str, float | str]:
    skips = SkipLog(folder / "skipped.jsonl", max_share=1.0)  # what is left is counted instead
    reader = Reader(config.data.batch_size, config.data.num_workers, config.data.worker_timeout, skips)
    network = tools.network
    fids = {radius: FID(network.num_features) for radius in options.blur} if network and "fid" in wanted else {}
    metrics: dict[str, float | str] = {}
    seen_real = None
    if tools.reference is not None and network is not None:
        reconstruction = None
        if tools.tokenizer is not None:
            reconstruction = ReconstructionMetrics(tools.tokenizer.model.to(network.device), tools.lpips)
        rfid = FID(network.num_features)
        seen_real = measure_reference(
            tools.reference, reader, network=network, fids=fids, reconstruction=reconstruction, rfid=rfid
        )
        _require_enough(options, wanted & {"reconstruction"}, 0, seen_real.count)
        if reconstruction is not None:
            metrics |= {**reconstruction.compute(), "eval/rfid": rfid.compute()}
    seen = None
    if candidates.files:
        attributes = AttributeAccuracy(config.data.image_size) if "toy" in wanted else None
        style = None
        if "style" in wanted and network is not None and network.classes is not None:
            style = StyleAccuracy(network.classes, options.base_style)
        images = ImageFiles(candidates.files, candidates.prompts, config.data.image_size)
        seen = measure_generated(images, reader, network=network, fids=fids, attributes=attributes, style=style)
        _require_enough(options, wanted, len(seen.prompts), seen_real.count if seen_real else None)
        for judge in (attributes, style):
            metrics |= judge.compute() if judge else {}
        if "is" in wanted:
            metrics["eval/is"] = inception_score(torch.cat(seen.logits), options.is_splits, config.seed)
    for radius, fid in fids.items():
        metrics[f"eval/fid_{radius:g}"] = fid.compute()
    if tools.captioner is not None and tools.captioner_codes is not None:
        metrics["eval/caption_loss"] = _caption_loss(config, tools.captioner, tools.captioner_codes, candidates, reader)
    if network is not None and fids:
        _warn_of_few(network, seen_real, seen)
    return metrics | {
        f"protocol/{key}": value for key, value in _protocol(config, options, wanted, tools, seen_real, seen).items()
    }


def _caption_loss(
    config: Config, captioner: Captioner, tokenizer: ImageTokenizer, candidates: Candidates, reader: Reader
) -> float:
    device, _ = inference_device(config)
    images = ImageFiles(candidates.files, candidates.prompts, tokenizer.settings["image_size"])
    losses: list[float] = []
    for batch in reader.batches(images, "caption loss"):
        codes = encode(list(batch.images), tokenizer, device, config.sampler.batch_size)
        losses += captioner.losses(batch.texts, codes, config.sampler.batch_size)
    return fmean(losses)


def _warn_of_few(network: FeatureNetwork, real: Reference | None, generated: Generated | None) -> None:
    fewest = min(real.count if real else 0, len(generated.prompts) if generated else 0)
    if fewest <= network.num_features:
        _log.warning(
            "FID: %d images for %d features; the smaller the number, the larger the bias. Compare equal numbers only",
            fewest,
            network.num_features,
        )


def _protocol(
    config: Config,
    options: EvaluateConfig,
    wanted: set[str],
    tools: Tools,
    real: Reference | None,
    generated: Generated | None,
) -> dict[str, float | str]:
    """What the numbers depend on besides the images' painter: those of two protocols cannot be compared."""
    found: dict[str, float | str] = {"image_size": config.data.image_size, "seed": config.seed}
    if tools.network is not None:
        found |= {
            "features_sha256": tools.network.sha256,
            "resolution": tools.network.resolution,
            "resize_filter": RESIZE_FILTER,
        }
    if "fid" in wanted:
        found["blur_radii"] = ",".join(f"{radius:g}" for radius in options.blur)
    if "is" in wanted:
        found["is_splits"] = options.is_splits
    if tools.lpips is not None:
        found["lpips_sha256"] = tools.lpips.sha256
    if "style" in wanted:
        found["base_style"] = options.base_style
    if tools.captioner is not None:
        found["captioner_sha256"] = digest_of_weights(tools.captioner.model)
    if real is not None:
        found |= {"reference_images": real.count, "reference_sha256": real.sha256}
    if generated is not None:
        found["generated_images"] = len(generated.prompts)
        if config.images is None:
            found["prompts_sha256"] = digest_of_prompts(generated.prompts)
        if config.images is None and config.pairs is None:
            settings = plain(asdict(config.sampler))
            found |= {f"sampler_{key}": settings[key] for key in settings.keys() - _SETTINGS_WITHOUT_EFFECT}
            found |= {
                "num_images_per_prompt": config.num_images_per_prompt,
                "top_n": config.top_n or config.num_images_per_prompt,
            }
    return found
