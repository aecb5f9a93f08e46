"""task=evaluate: metrics of given or newly generated images, with the protocol of the measurement."""

from __future__ import annotations

import time
from pathlib import Path

from cogview_pl.assembly.devices import inference_device
from cogview_pl.assembly.image_data import open_images
from cogview_pl.assembly.models import newest_image_tokenizer
from cogview_pl.assembly.options import ModelOptions
from cogview_pl.assembly.pipelines import open_generator, open_pipeline
from cogview_pl.assembly.prompts import prompts_or_captions
from cogview_pl.assembly.roles import CAPTIONER, open_role
from cogview_pl.assembly.samples import write_samples
from cogview_pl.checkpoints.model_folder import ImageTokenizer
from cogview_pl.checkpoints.settings import plain
from cogview_pl.config.parts import generation_options, model_options
from cogview_pl.config.schema import Config
from cogview_pl.data.bad_samples import BadSampleLog
from cogview_pl.data.image_folders.walk import find_images
from cogview_pl.data.sharing import Team
from cogview_pl.errors import UserError
from cogview_pl.evaluation.config import EvaluateConfig
from cogview_pl.evaluation.evaluation import Candidates, Evaluation, Tools
from cogview_pl.evaluation.features import FeatureNetwork, open_features
from cogview_pl.evaluation.image_files import ImageFiles
from cogview_pl.evaluation.lpips import KEY as LPIPS_KEY
from cogview_pl.evaluation.lpips import LPIPS, SMALLEST, open_lpips
from cogview_pl.evaluation.measure import Images, Reader
from cogview_pl.evaluation.protocol import PROTOCOL, compare, table
from cogview_pl.evaluation.requirements import (
    check_prompts,
    need_network,
    need_reference,
    refuse_without_prompts,
    require_enough,
    wanted_metrics,
)
from cogview_pl.generation.contact_sheet import load_font
from cogview_pl.generation.rerank import Captioner
from cogview_pl.runs.image_files import image_files, pairs_file, read_pairs
from cogview_pl.runs.run_folder import SAMPLES, Metrics, RunFolder, predecessor, require_metrics
from cogview_pl.toy_world.captions import STYLES

_WITHOUT_EFFECT = {"batch_size", "cuda_graphs", "engine"}  # keys of the sampler that images do not depend on


def run(config: Config, folder: RunFolder, team: Team) -> Metrics:
    """Measure the metrics in `evaluate.metrics`, or compare two evaluations."""
    options = config.evaluate
    assert options is not None
    if options.compare is not None:
        for path in options.compare:
            require_metrics(Path(path))
        if not team.first:
            return {}
        found = compare(options.compare)
        print(table(found))
        return found
    wanted = wanted_metrics(options)
    tools = _open_tools(config, options, wanted)
    candidates = _candidates(config, options, wanted, tools, folder, team)
    started = time.perf_counter()
    evaluation = Evaluation(
        options, wanted, tools, config.data.image_size, config.seed, batch_size=config.sampler.batch_size
    )
    # `require_enough` limits unreadable images.
    bad_samples = BadSampleLog(folder / "skipped.jsonl", max_share=1.0) if team.first else None
    reader = Reader(config.data.batch_size, config.data.num_workers, config.data.worker_timeout, bad_samples, team)
    metrics = evaluation.measure(candidates, reader)
    if not team.first:
        return {}
    if candidates.files and config.images is None and config.pairs is None:
        metrics |= {f"{PROTOCOL}{key}": value for key, value in _sampling_protocol(config).items()}
    metrics["perf/evaluate_s"] = round(time.perf_counter() - started, 1)
    return metrics


def _open_tools(config: Config, options: EvaluateConfig, wanted: set[str]) -> Tools:
    models, size = model_options(config), config.data.image_size
    device, dtype = inference_device(config.trainer, config.precision)
    network = None
    if need_network(wanted):
        network = _open_network(models, options, wanted, device)
    captioner = codes = None
    if "caption_loss" in wanted:
        loaded = open_role(CAPTIONER, models, config.rerank_with, config.rerank_template)
        captioner, codes = Captioner(loaded, device, dtype), loaded.image_tokenizer
        codes.model.to(device)
    reference: Images | None = None
    if need_reference(wanted):
        folder = options.reference
        reference = open_images(config.data, "val", ()) if folder is None else _folder_of_images(Path(folder), size)
    return Tools(
        network=network,
        tokenizer=_open_tokenizer(models, size) if "reconstruction" in wanted else None,
        captioner=captioner,
        captioner_codes=codes,
        reference=reference,
        lpips=None if options.lpips is None else _open_lpips(options.lpips, size, device, config.verify),
    )


def _open_network(models: ModelOptions, options: EvaluateConfig, wanted: set[str], device: str) -> FeatureNetwork:
    path = predecessor(models.outputs, "features", "evaluate.features", options.features)
    network = open_features(
        path,
        device=device,
        resolution=options.resolution,
        trust=options.trust_features,
        verify=models.verify,
    )
    if "is" in wanted and network.num_classes is None:
        raise UserError(f"evaluate.features={path} gives no logits of classes; leave is out of evaluate.metrics")
    if "style" in wanted:
        known = set(network.classes or ())
        if not known or not known <= set(STYLES):
            raise UserError(
                f"evaluate.features={path} does not know the styles of the toy world; give a run of task=features "
                "data=toy, or leave style out of evaluate.metrics"
            )
        if options.base_style not in known:
            raise UserError(f"evaluate.base_style={options.base_style}: the network knows {', '.join(sorted(known))}")
    return network


def _open_tokenizer(models: ModelOptions, image_size: int) -> ImageTokenizer:
    tokenizer = newest_image_tokenizer(models)
    size = tokenizer.settings["image_size"]
    if image_size != size:
        raise UserError(
            f"data.image_size={image_size}: the image tokenizer was trained on {size} pixels; set "
            f"data.image_size={size}, or leave reconstruction out of evaluate.metrics"
        )
    return tokenizer


def _open_lpips(files: list[str], image_size: int, device: str, verify: bool) -> LPIPS:
    if image_size < SMALLEST:
        raise UserError(f"{LPIPS_KEY} needs images of {SMALLEST} pixels, data.image_size={image_size}")
    return open_lpips(files, device=device, verify=verify)


def _folder_of_images(root: Path, image_size: int) -> ImageFiles:
    files = list(find_images(root)) if root.is_dir() else []
    if not files:
        raise UserError(f"evaluate.reference={root} holds no images; give a folder of real images")
    return ImageFiles(files, [""] * len(files), image_size)


def _candidates(
    config: Config, options: EvaluateConfig, wanted: set[str], tools: Tools, folder: RunFolder, team: Team
) -> Candidates:
    """Images that the user names, or newly generated images. All checks come before generation."""
    if wanted <= {"reconstruction"}:
        require_enough(wanted, options.is_splits, 0, tools.num_reference)
        return Candidates([], [])
    given = [key for key in ("pairs", "images", "prompts") if getattr(config, key) is not None]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} both name images to evaluate; give one of them")
    if config.pairs is not None:
        candidates = _listed(pairs_file(Path(config.pairs)))
        check_prompts(wanted, tools.captioner, options.base_style, candidates.prompts)
    elif config.images is not None:
        refuse_without_prompts(wanted, config.images)
        files = image_files(config.images)
        candidates = Candidates(files, [""] * len(files))
    else:
        return _generated(config, options, wanted, tools, folder, team)
    readable = sum(file.is_file() for file in candidates.files)
    require_enough(wanted, options.is_splits, readable, tools.num_reference)
    return candidates


def _generated(
    config: Config, options: EvaluateConfig, wanted: set[str], tools: Tools, folder: RunFolder, team: Team
) -> Candidates:
    generation = generation_options(config)
    pipeline = open_pipeline(generation, open_generator(generation))
    prompts = team.tell(prompts_or_captions(config.prompts, config.data, config.num_prompts) if team.first else [])
    pipeline.generator.tokenise(prompts)
    load_font(config.font, 12)
    check_prompts(wanted, tools.captioner, options.base_style, prompts)
    require_enough(wanted, options.is_splits, len(prompts) * generation.kept, tools.num_reference)
    write_samples(generation, folder, pipeline, prompts, team)
    return team.tell(_listed(folder / SAMPLES) if team.first else Candidates([], []))


def _listed(file: Path) -> Candidates:
    pairs = read_pairs(file)
    return Candidates([file.parent / pair["file"] for pair in pairs], [pair["prompt"] for pair in pairs])


def _sampling_protocol(config: Config) -> dict[str, float | str]:
    settings = plain(config.sampler)
    return {
        **{f"sampler_{key}": settings[key] for key in settings.keys() - _WITHOUT_EFFECT},
        "num_images_per_prompt": config.num_images_per_prompt,
        "top_n": config.top_n or config.num_images_per_prompt,
    }
