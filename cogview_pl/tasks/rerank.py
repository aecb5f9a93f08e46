"""task=rerank: prompts and image files → caption loss of each pair, and the ranking of a prompt's images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from operator import itemgetter
from statistics import fmean

from cogview_pl.assembly.devices import inference_device
from cogview_pl.assembly.image_data import validation_images
from cogview_pl.assembly.roles import CAPTIONER, hash_of_role, inference_settings, open_role
from cogview_pl.config.parts import model_options
from cogview_pl.config.schema import Config
from cogview_pl.data.input_images import FirstImages, InputImages
from cogview_pl.data.sharing import Team
from cogview_pl.errors import UserError
from cogview_pl.evaluation.retrieval import information, other_captions, place_of_own, retrieval
from cogview_pl.generation.codes import encode_images
from cogview_pl.generation.rerank import Captioner
from cogview_pl.lit.bars import Bar
from cogview_pl.runs.image_files import pairs_of
from cogview_pl.runs.result_list import ResultList
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.toy_world.accuracy import meaning
from cogview_pl.vqvae.external import AnyTokenizer

_TOP = (1, 5)

Scored = tuple[list[dict[str, object]], list[dict[str, str]]]
"""Records of a batch, and those of its unreadable images."""


def run(config: Config, folder: RunFolder, team: Team) -> dict[str, float]:
    """Rank the images in `pairs`; without pairs, rank the own captions of validation images among false ones."""
    model = open_role(CAPTIONER, model_options(config), config.rerank_with, config.rerank_template)
    device, dtype = inference_device(config.trainer, config.precision)
    captioner = Captioner(model, device, dtype, config.quantization)
    tokenizer = model.image_tokenizer.model.to(device)
    images: InputImages
    if config.pairs is not None:
        images = pairs_of(config.pairs, model.image_tokenizer.settings["image_size"])
        each, score = 1, _score_pairs(captioner, tokenizer, images)
    else:
        images = FirstImages(validation_images(config.data), config.num_prompts)
        each = config.num_captions
        score = _score_captions(captioner, tokenizer, images, each, config.sampler.batch_size)
    images.require_readable()
    results = ResultList(
        folder,
        images,
        settings=inference_settings(
            config.precision, config.quantization, sampler=config.sampler, num_captions=config.num_captions
        ),
        inputs={"rerank_with": hash_of_role(CAPTIONER, config.outputs, config.rerank_with)},
        verify=config.verify,
    )
    batches = team.batches(len(images), config.sampler.batch_size)
    resume = bool(config.resume)
    done = team.tell(results.begin(resume=resume, batch_size=len(batches[0])) if team.first else 0)
    with Bar("rank", len(images) * each, "pairs", done=done * each) as bar:
        for scored, skipped in team.in_order(score, [batch for batch in batches if batch.start >= done]):
            results.add(scored, skipped)
            bar.update((len(scored) + len(skipped)) * each)
    if not team.first:
        return {}
    results.say_skipped()
    return _rank(results, images) if config.pairs is not None else _count_places(results, each)


def _score_pairs(captioner: Captioner, tokenizer: AnyTokenizer, images: InputImages) -> Callable[[range], Scored]:
    captioner.tokenise([images.record(number)["prompt"] for number in range(len(images))])  # refuse long texts now

    def score(batch: range) -> Scored:
        numbers, pixels, skipped = images.read_some(batch)
        if not numbers:
            return [], skipped
        pairs = [images.record(number) for number in numbers]
        codes = encode_images(pixels, tokenizer, len(batch))
        losses = captioner.losses([pair["prompt"] for pair in pairs], codes, len(batch))
        return [{**pair, "caption_loss": loss} for pair, loss in zip(pairs, losses, strict=True)], skipped

    return score


def _rank(results: ResultList, images: InputImages) -> dict[str, float]:
    """Sort the pairs of each prompt, lowest caption loss first."""
    prompts = dict.fromkeys(images.record(number)["prompt"] for number in range(len(images)))
    place = {prompt: number for number, prompt in enumerate(prompts)}
    results.sort(lambda record: (place[record["prompt"]], record["caption_loss"]))
    loss = fmean(map(itemgetter("caption_loss"), results.records()))
    return {"rerank/pairs": results.count, "rerank/skipped": results.num_skipped, "rerank/caption_loss": loss}


def _score_captions(
    captioner: Captioner, tokenizer: AnyTokenizer, images: FirstImages, candidates: int, batch_size: int
) -> Callable[[range], Scored]:
    """Score the own caption of images among false ones, which are captions of other images."""
    texts = [images.text(number) for number in range(len(images))]
    captioner.tokenise(texts)  # refuse long texts now
    captioned = [number for number, text in enumerate(texts) if text]
    meanings = [meaning(texts[number]) for number in captioned]
    fewest = len(captioned) - max(Counter(meanings).values(), default=0)
    if fewest < candidates - 1:
        raise UserError(
            f"num_captions={candidates}: of {len(captioned)} captioned validation images only {fewest} have a caption "
            "that says something else; raise num_prompts or lower num_captions"
        )
    own_place = {number: place for place, number in enumerate(captioned)}

    def score(batch: range) -> Scored:
        numbers, pixels, skipped = images.read_some(batch)
        if not numbers:
            return [], skipped
        scored: list[dict[str, object]] = []
        for number, codes in zip(numbers, encode_images(pixels, tokenizer, len(batch)), strict=True):
            others = other_captions(meanings, own_place[number], candidates - 1)
            scored_with = [number, *(captioned[other] for other in others)]
            found = [texts[caption] for caption in scored_with]
            losses = captioner.losses(found, codes.expand(candidates, -1, -1), batch_size)
            own: dict[str, object] = {"caption": found[0], "caption_loss": losses[0], "place": place_of_own(losses)}
            own |= {"captions_of": scored_with, "caption_losses": losses}
            scored.append({**images.record(number), **own})
        return scored, skipped

    return score


def _count_places(results: ResultList, candidates: int) -> dict[str, float]:
    """Share of images whose own caption is the best among false ones, by caption loss and by pointwise information."""
    records = [(r["caption_losses"], r["captions_of"], r["place"]) for r in results.records()]
    losses, captions, places = zip(*records, strict=True)
    shares = retrieval(places, _TOP)
    informed = retrieval([place_of_own(values) for values in information(losses, captions)], _TOP)
    return {
        "rerank/images": results.count,
        "rerank/captions": candidates,
        "rerank/skipped": results.num_skipped,
        "rerank/caption_loss": fmean(values[0] for values in losses),
        **{f"rerank/own_caption_top{k}": share for k, share in shares.items()},
        **{f"rerank/own_caption_information_top{k}": share for k, share in informed.items()},
    }
