"""task=rerank: prompts and image files → caption loss of each pair, and their order."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

import torch
from tqdm import tqdm

from cogview_pl.assembly.image_data import validation_samples
from cogview_pl.assembly.models import inference_device, open_sequence_model, quantization
from cogview_pl.checkpoints.model_folder import ImageTokenizer
from cogview_pl.config.schema import Config
from cogview_pl.errors import UserError
from cogview_pl.evaluation.retrieval import other_captions, retrieval
from cogview_pl.generation.rerank import Captioner
from cogview_pl.runs.image_files import load_pairs, write_records
from cogview_pl.runs.run_folder import SAMPLES, RunFolder, predecessor
from cogview_pl.tasks.generate_captions import encode
from cogview_pl.toy_world.accuracy import meaning

_TOP = (1, 5)


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Rank the images in `pairs`; without, see how well validation images find their own captions."""
    path = predecessor(config.outputs, "caption", "rerank_with", config.rerank_with)
    loaded = open_sequence_model(config, path, "rerank_with", config.rerank_template)
    captioner = Captioner(loaded, *inference_device(config), quantization(config))
    if config.pairs is None:
        return _find_captions(config, folder, captioner, loaded.image_tokenizer)
    return _rank(config, folder, captioner, loaded.image_tokenizer)


def _rank(config: Config, folder: RunFolder, captioner: Captioner, tokenizer: ImageTokenizer) -> dict[str, float]:
    """Write `samples.jsonl`: the pairs of each prompt, lowest caption loss first; `skipped.jsonl`: unreadable files."""
    assert config.pairs is not None
    pairs, images, skipped = load_pairs(config.pairs, tokenizer.settings["image_size"])
    codes = encode(images, tokenizer, inference_device(config)[0], config.sampler.batch_size)
    losses = captioner.losses([pair["prompt"] for pair in pairs], codes, config.sampler.batch_size)
    scored = [{**pair, "caption_loss": loss} for pair, loss in zip(pairs, losses, strict=True)]
    place = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair["prompt"] for pair in pairs))}
    scored.sort(key=lambda pair: (place[str(pair["prompt"])], pair["caption_loss"]))
    write_records(folder / SAMPLES, scored)
    if skipped:
        write_records(folder / "skipped.jsonl", skipped)
    return {"rerank/pairs": len(scored), "rerank/skipped": len(skipped), "rerank/caption_loss": fmean(losses)}


def _find_captions(
    config: Config, folder: RunFolder, captioner: Captioner, tokenizer: ImageTokenizer
) -> dict[str, float]:
    """Each of `num_prompts` validation images with its own caption and false ones: how often the own is lowest."""
    samples, skipped = validation_samples(config.data, config.num_prompts)
    if skipped:
        write_records(folder / "skipped.jsonl", [sample._asdict() for sample in skipped])
    candidates = config.num_captions
    meanings = [meaning(sample.text) for sample in samples]
    fewest = len(samples) - max(Counter(meanings).values(), default=0)
    if fewest < candidates - 1:
        raise UserError(
            f"num_captions={candidates}: of {len(samples)} readable validation images only {fewest} have a caption "
            "that says something else; raise num_prompts or lower num_captions"
        )
    device, _ = inference_device(config)
    codes = encode([sample.image for sample in samples], tokenizer, device, config.sampler.batch_size)
    rows = []
    for own, sample in enumerate(tqdm(samples, unit="pic", desc="captions", disable=None)):
        others = [samples[index].text for index in other_captions(meanings, own, candidates - 1)]
        texts = [sample.text, *others]
        rows.append(captioner.losses(texts, codes[own].expand(candidates, -1, -1), config.sampler.batch_size))
    shares = retrieval(torch.tensor(rows), _TOP)
    return {
        "rerank/images": len(samples),
        "rerank/skipped": len(skipped),
        "rerank/captions": candidates,
        "rerank/caption_loss": fmean(row[0] for row in rows),
        **{f"rerank/own_caption_top{k}": share for k, share in shares.items()},
    }
