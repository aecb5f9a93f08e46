"""Figures of experiment=portraits and portraits_128, by the judge that lies beside the pictures.

    python -m benchmarks.portraits PORTRAITS CHAIN [STAGE …]

PORTRAITS is the folder of the pictures, CHAIN that of the chain's run. Prints one JSON object per stage: shares of
attributes and of whole pictures that the judge reads as the prompt, or the picture itself, has them.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from cogview_pl.checkpoints.model_folder import load_image_tokenizer
from cogview_pl.evaluation.retrieval import Ranked, best_of
from cogview_pl.generation.codes import decode_codes, encode_images
from cogview_pl.generation.pipeline import pil_images
from cogview_pl.runs.run_folder import CHAIN

Figures = dict[str, Any]
_ALL = ("all", "whole_pictures")
_BATCH = 64


class Portraits:
    """The validation pictures and their judge.

    Args:
        folder: the folder of the pictures; it holds `judge.py`, which is run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.module = _module(folder / "judge.py")
        self.judge = self.module.load_judge(folder / "judge.safetensors")
        self.vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        samples = list(self.module.samples([folder], "val"))
        self.labels: dict[str, Mapping[str, str]] = {key: labels for key, _, labels in samples}
        self._files: dict[str, bytes] = {key: file for key, file, _ in samples}

    def picture(self, key: str) -> Image.Image:
        """A validation picture, RGB, 128 px."""
        return Image.open(io.BytesIO(self._files[key])).convert("RGB")

    def named(self, text: str) -> Mapping[str, str]:
        """Attribute → value, as a text names them."""
        found: Mapping[str, str] = self.module.parse(text, self.vocabulary)
        return found

    def report(self, pictures: Sequence[Image.Image], wanted: Sequence[Mapping[str, str]]) -> Figures:
        """Shares of attributes, and of pictures, that are as wanted."""
        found = self._read(pictures)
        return {name: row["accuracy"] for name, row in self.module.report(found, wanted, self.judge.classes).items()}

    def right(self, pictures: Sequence[Image.Image], wanted: Sequence[Mapping[str, str]]) -> list[bool]:
        """Whether all that is wanted is in a picture, for each one."""
        found = self._read(pictures)
        return [all(got[n] == v for n, v in one.items()) for got, one in zip(found, wanted, strict=True)]

    def _read(self, pictures: Sequence[Image.Image]) -> list[Mapping[str, str]]:
        """Attribute → value, as the judge reads it off each picture."""
        found: list[Mapping[str, str]] = self.judge.read(torch.stack(list(map(self.module.to_tensor, pictures))))
        return found


def reconstructions(portraits: Portraits, run: Path, tokenizer: Path) -> Figures:
    """Of validation pictures by the image tokenizer: of all styles, and of each."""
    pictures = _reconstructed(tokenizer, [portraits.picture(key) for key in portraits.labels])
    labels = list(portraits.labels.values())
    found: Figures = {"all_styles": portraits.report(pictures, labels)}
    for style in dict.fromkeys(one["style"] for one in labels):
        chosen = [number for number, one in enumerate(labels) if one["style"] == style]
        report = portraits.report([pictures[n] for n in chosen], [labels[n] for n in chosen])
        found[style] = {name: report[name] for name in _ALL}
    return found


def pictures(portraits: Portraits, run: Path, tokenizer: Path) -> Figures:
    """Of generated pictures, by their prompts; those that name a combination without training pictures apart."""
    return {
        part: {name: row["accuracy"] for name, row in report.items()}
        for part, report in portraits.module.score(portraits.folder, run / "samples.jsonl", portraits.judge).items()
    }


def captions(portraits: Portraits, run: Path, tokenizer: Path) -> Figures:
    """Of captions: attributes that are named right, of those that a full caption names and of all.

    Of all, silence counts as right where the picture lacks the thing, or has the usual one.
    """
    named_right, all_right, whole = [], [], []
    for record in _records(run):
        truth = {name: v for name, v in portraits.labels[record["file"]].items() if name != "style"}
        said = portraits.named(record["caption"])
        hits = {n: said.get(n) == v or (n not in said and v in _UNNAMED) for n, v in truth.items()}
        named_right += [hit for name, hit in hits.items() if truth[name] not in _UNNAMED]
        all_right += hits.values()
        whole.append(all(hits.values()))
    shares = {"named": named_right, "all": all_right, "whole_captions": whole}
    return {**{name: fmean(hits) for name, hits in shares.items()}, "captions": len(whole)}


def ranked(portraits: Portraits, run: Path, tokenizer: Path) -> Figures:
    """Best of N by caption loss and by an oracle, and the share of the gap to the oracle that ranking closes at 8."""
    groups: dict[str, list[Ranked]] = {}
    records = _records(run)
    right = portraits.right([_opened(run, r) for r in records], [portraits.named(r["prompt"]) for r in records])
    for record, hit in zip(records, right, strict=True):
        groups.setdefault(record["prompt"], []).append(Ranked(record["seed"], record["caption_loss"], hit))
    curve = best_of(list(groups.values()))
    first, (chosen, oracle) = curve[1][0], curve[8]
    closed = (chosen - first) / (oracle - first) if oracle > first else None
    return {"best_of": curve, "gap_closed_by_best_of_8": closed, "prompts": len(groups)}


def magnified(portraits: Portraits, run: Path, tokenizer: Path) -> Figures:
    """Of upscaled pictures, and of the small ones as the image tokenizer decodes them from their codes."""
    records = _records(run)
    labels = [portraits.labels[record["source"]] for record in records]
    small = _reconstructed(tokenizer, [portraits.picture(record["source"]) for record in records])
    before, after = portraits.report(small, labels), portraits.report([_opened(run, r) for r in records], labels)
    return {"before": {name: before[name] for name in _ALL}, "after": {name: after[name] for name in _ALL}}


_UNNAMED = ("none", "open")  # full captions do not name what is missing or usual
STAGES: dict[str, Callable[[Portraits, Path, Path], Figures]] = {
    "vqvae": reconstructions,
    "generate": pictures,
    "styled": pictures,
    "captions": captions,
    "ranked": ranked,
    "magnified": magnified,
}


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("portraits_judge", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def _opened(run: Path, record: Mapping[str, Any]) -> Image.Image:
    return Image.open(run / record["file"]).convert("RGB")


@torch.inference_mode()
def _reconstructed(run: Path, originals: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures as the image tokenizer of a run decodes them from their codes, at its own size."""
    tokenizer = load_image_tokenizer(run)
    edge = tokenizer.settings["image_size"]
    small: list[Tensor] = [
        resize(pil_to_tensor(one), [edge, edge], InterpolationMode.BICUBIC, antialias=True) for one in originals
    ]
    found = decode_codes(encode_images(small, tokenizer.model, _BATCH), tokenizer.model, _BATCH)
    return pil_images(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portraits", type=Path)
    parser.add_argument("chain", type=Path)
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], metavar="STAGE")
    args = parser.parse_args()
    portraits = Portraits(args.portraits)
    finished = json.loads((args.chain / CHAIN).read_text(encoding="utf-8"))["stages"]
    runs = {name: Path(stage["folder"]) for name, stage in finished.items() if stage["metrics"] is not None}
    for stage in args.stages or [name for name in STAGES if name in runs]:
        print(json.dumps({stage: STAGES[stage](portraits, runs[stage], runs["vqvae"])}), flush=True)


if __name__ == "__main__":
    main()
