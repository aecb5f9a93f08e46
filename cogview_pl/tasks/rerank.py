"""task=rerank: prompts and image files → caption loss of each pair, and the ranking of a prompt's images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import torch

from cogview_pl.assembly.image_data import validation_samples
from cogview_pl.assembly.models import inference_device
from cogview_pl.assembly.roles import CAPTIONER, open_role
from cogview_pl.config.parts import model_options
from cogview_pl.config.schema import Config
from cogview_pl.data.samples import ImageSample
from cogview_pl.errors import UserError
from cogview_pl.evaluation.retrieval import other_captions, retrieval
from cogview_pl.generation.codes import encode_images
from cogview_pl.generation.rerank import Captioner
from cogview_pl.lit.bars import Bar
from cogview_pl.runs.image_files import load_pairs, write_records
from cogview_pl.runs.run_folder import SAMPLES, RunFolder
from cogview_pl.toy_world.accuracy import meaning
from cogview_pl.vqvae.model import VQVAE

_TOP = (1, 5)


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Rank the images in `pairs`; without pairs, rank the own captions of validation images among false ones."""
    model = open_role(CAPTIONER, model_options(config), config.rerank_with, config.rerank_template)
    device, dtype = inference_device(config.precision)
    captioner = Captioner(model, device, dtype, config.quantization)
    tokenizer = model.image_tokenizer.model.to(device)
    batch_size = config.sampler.batch_size
    if config.pairs is not None:
        size = model.image_tokenizer.settings["image_size"]
        return _rank(folder, captioner, tokenizer, config.pairs, size, batch_size)
    samples, skipped = validation_samples(config.data, config.num_prompts)
    if skipped:
        write_records(folder / "skipped.jsonl", [sample._asdict() for sample in skipped])
    found = _find_captions(captioner, tokenizer, samples, config.num_captions, batch_size)
    return {**found, "rerank/skipped": len(skipped)}


def _rank(
    folder: RunFolder, captioner: Captioner, tokenizer: VQVAE, pairs_path: str, size: int, batch_size: int
) -> dict[str, float]:
    """Write `samples.jsonl`: the pairs of each prompt, lowest caption loss first; `skipped.jsonl`: unreadable files."""
    pairs, images, skipped = load_pairs(pairs_path, size)
    codes = encode_images(images, tokenizer, batch_size)
    with Bar("rank", len(pairs), "pairs") as bar:
        losses = captioner.losses([pair["prompt"] for pair in pairs], codes, batch_size, on_pairs=bar.update)
    scored = [{**pair, "caption_loss": loss} for pair, loss in zip(pairs, losses, strict=True)]
    place = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair["prompt"] for pair in pairs))}
    scored.sort(key=lambda pair: (place[str(pair["prompt"])], pair["caption_loss"]))
    write_records(folder / SAMPLES, scored)
    if skipped:
        write_records(folder / "skipped.jsonl", skipped)
    return {"rerank/pairs": len(scored), "rerank/skipped": len(skipped), "rerank/caption_loss": fmean(losses)}


def _find_captions(
    captioner: Captioner, tokenizer: VQVAE, samples: Sequence[ImageSample], candidates: int, batch_size: int
) -> dict[str, float]:
    """Share of images whose own caption has the lowest loss among false ones."""
    meanings = [meaning(sample.text) for sample in samples]
    fewest = len(samples) - max(Counter(meanings).values(), default=0)
    if fewest < candidates - 1:
        raise UserError(
            f"num_captions={candidates}: of {len(samples)} readable validation images only {fewest} have a caption "
            "that says something else; raise num_prompts or lower num_captions"
        )
    codes = encode_images([sample.image for sample in samples], tokenizer, batch_size)
    rows = []
    with Bar("rank captions", len(samples) * candidates, "pairs") as bar:
        for own, sample in enumerate(samples):
            others = [samples[index].text for index in other_captions(meanings, own, candidates - 1)]
            own_codes = codes[own].expand(candidates, -1, -1)
            rows.append(captioner.losses([sample.text, *others], own_codes, batch_size, on_pairs=bar.update))
    shares = retrieval(torch.tensor(rows), _TOP)
    return {
        "rerank/images": len(samples),
        "rerank/captions": candidates,
        "rerank/caption_loss": fmean(row[0] for row in rows),
        **{f"rerank/own_caption_top{k}": share for k, share in shares.items()},
    }
