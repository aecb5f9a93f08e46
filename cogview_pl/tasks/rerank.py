"""task=rerank: prompts and image files → caption loss of each pair, and the ranking of a prompt's images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import torch

from cogview_pl.assembly.devices import inference_device
from cogview_pl.assembly.image_data import validation_samples
from cogview_pl.assembly.roles import CAPTIONER, open_role
from cogview_pl.config.parts import model_options
from cogview_pl.config.schema import Config
from cogview_pl.data.samples import ImageSample
from cogview_pl.data.sharing import Team
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


def run(config: Config, folder: RunFolder, team: Team) -> dict[str, float]:
    """Rank the images in `pairs`; without pairs, rank the own captions of validation images among false ones."""
    model = open_role(CAPTIONER, model_options(config), config.rerank_with, config.rerank_template)
    device, dtype = inference_device(config.trainer, config.precision)
    captioner = Captioner(model, device, dtype, config.quantization)
    tokenizer = model.image_tokenizer.model.to(device)
    batch_size = config.sampler.batch_size
    if config.pairs is not None:
        size = model.image_tokenizer.settings["image_size"]
        return _rank(folder, captioner, tokenizer, config.pairs, size, batch_size, team)
    samples, skipped = validation_samples(config.data, config.num_prompts)
    if skipped and team.first:
        write_records(folder / "skipped.jsonl", [sample._asdict() for sample in skipped])
    found = _find_captions(captioner, tokenizer, samples, config.num_captions, batch_size, team)
    return {**found, "rerank/skipped": len(skipped)} if team.first else {}


def _rank(
    folder: RunFolder, captioner: Captioner, tokenizer: VQVAE, pairs_path: str, size: int, batch_size: int, team: Team
) -> dict[str, float]:
    """Write `samples.jsonl`: the pairs of each prompt, lowest caption loss first; `skipped.jsonl`: unreadable files."""
    pairs, images, skipped = load_pairs(pairs_path, size)

    def score(batch: range) -> list[float]:
        codes = encode_images([images[number] for number in batch], tokenizer, len(batch))
        return captioner.losses([pairs[number]["prompt"] for number in batch], codes, len(batch))

    losses: list[float] = []
    with Bar("rank", len(pairs), "pairs") as bar:
        for part in team.in_order(score, team.batches(len(pairs), batch_size)):
            losses += part
            bar.update(len(part))
    if not team.first:
        return {}
    scored = [{**pair, "caption_loss": loss} for pair, loss in zip(pairs, losses, strict=True)]
    place = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair["prompt"] for pair in pairs))}
    scored.sort(key=lambda pair: (place[str(pair["prompt"])], pair["caption_loss"]))
    write_records(folder / SAMPLES, scored)
    if skipped:
        write_records(folder / "skipped.jsonl", skipped)
    return {"rerank/pairs": len(scored), "rerank/skipped": len(skipped), "rerank/caption_loss": fmean(losses)}


def _find_captions(
    captioner: Captioner,
    tokenizer: VQVAE,
    samples: Sequence[ImageSample],
    candidates: int,
    batch_size: int,
    team: Team,
) -> dict[str, float]:
    """Share of images whose own caption has the lowest loss among false ones; empty in all processes but the first."""
    meanings = [meaning(sample.text) for sample in samples]
    fewest = len(samples) - max(Counter(meanings).values(), default=0)
    if fewest < candidates - 1:
        raise UserError(
            f"num_captions={candidates}: of {len(samples)} readable validation images only {fewest} have a caption "
            "that says something else; raise num_prompts or lower num_captions"
        )

    def score(batch: range) -> list[list[float]]:
        codes = encode_images([samples[number].image for number in batch], tokenizer, len(batch))
        found = []
        for own, codes_yx in zip(batch, codes, strict=True):
            others = [samples[index].text for index in other_captions(meanings, own, candidates - 1)]
            texts = [samples[own].text, *others]
            found.append(captioner.losses(texts, codes_yx.expand(candidates, -1, -1), batch_size, on_pairs=bar.update))
        return found

    def count(batch: range) -> None:
        bar.update(len(batch) * candidates)

    with Bar("rank captions", len(samples) * candidates, "pairs") as bar:
        parts = team.in_order(score, team.batches(len(samples), batch_size), on_other=count)
        rows = [row for part in parts for row in part]
    if not team.first:
        return {}
    shares = retrieval(torch.tensor(rows), _TOP)
    return {
        "rerank/images": len(samples),
        "rerank/captions": candidates,
        "rerank/caption_loss": fmean(row[0] for row in rows),
        **{f"rerank/own_caption_top{k}": share for k, share in shares.items()},
    }
