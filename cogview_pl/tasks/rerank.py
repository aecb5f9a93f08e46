"""task=rerank: prompts and picture files → caption loss of each pair, and their order."""

from __future__ import annotations

from statistics import fmean

from cogview_pl.config import Config
from cogview_pl.generation.companions import Captioner
from cogview_pl.tasks.describe import encode
from cogview_pl.tasks.models import inference_device, open_sequence_model
from cogview_pl.tasks.pictures import SAMPLES, load_pairs, write_records
from cogview_pl.tasks.run_folder import RunFolder, predecessor


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Write `samples.jsonl`: the pairs of each prompt, lowest caption loss first; `skipped.jsonl`: unreadable files."""
    assert config.pairs is not None  # mandatory in conf/task/rerank.yaml
    path = predecessor(config.outputs, "caption", "rerank_with", config.rerank_with)
    loaded = open_sequence_model(config, path, "rerank_with", config.rerank_template)
    device, dtype = inference_device(config)
    captioner = Captioner(loaded, device, dtype)
    pairs, images, skipped = load_pairs(config.pairs, loaded.image_tokenizer.settings["image_size"])
    codes = encode(images, loaded.image_tokenizer, device, config.sampler.batch_size)
    losses = captioner.losses([pair["prompt"] for pair in pairs], codes, config.sampler.batch_size)
    scored = [{**pair, "caption_loss": loss} for pair, loss in zip(pairs, losses, strict=True)]
    place = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair["prompt"] for pair in pairs))}
    scored.sort(key=lambda pair: (place[str(pair["prompt"])], pair["caption_loss"]))
    write_records(folder / SAMPLES, scored)
    if skipped:
        write_records(folder / "skipped.jsonl", skipped)
    return {"rerank/pairs": len(scored), "rerank/skipped": len(skipped), "rerank/caption_loss": fmean(losses)}
