"""What to type after a run: a whole command that uses its result."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf

from cogview_pl.cli.overrides import quoted
from cogview_pl.config.choices import Verb
from cogview_pl.config.ignored_keys import OF_MODEL_FOLDERS, TOY_WORLD
from cogview_pl.durable.latest import LATEST, newest
from cogview_pl.errors import UserError
from cogview_pl.runs.command import command
from cogview_pl.runs.run_folder import METRICS, REPORT, SAMPLES

_NEEDS_NO_QUOTES = re.compile(r"[\w./-]+( [\w./-]+)*")
_PLAIN = re.compile(r"(?<=[=,\[])'([\w./-]+)'(?=[,\]]|$)")  # quoted for Hydra, though it needs no quotes
_PROMPT = "prompts=[左上角有一个大的红色圆形]"
_STYLED_PROMPT = "prompts=[左上角有一个大的红色圆形的油画图像]"
_KEPT_GROUPS = ("data", "model", "image_tokenizer", "text", "outputs", "threads")
"""Keys of a run that the next task takes over."""
_TRAINED_BY = ("adversarial", "perceptual", "trained_part")
_OF_LOSSES = tuple(f"image_tokenizer{sign}{name}" for sign in "./" for name in _TRAINED_BY)
"""Keys and groups of the training of an image tokenizer."""
_OF_TRAINING = ("image_tokenizer", "text.model=", "data.token_store=")
"""Keys whose values a sequence model has in its folder."""
_FROM_MODEL_FOLDERS = (Verb.generate.value, Verb.magnify.value, Verb.rerank.value)
"""Tasks that refuse keys whose values model folders have."""
_TOY = "data=toy"
_BEFORE_TRAINING = ("features", "vqvae", "tokenize")
"""Tasks after which an image tokenizer or a sequence model is trained."""
_EARLIER_EVALUATIONS = 20  # that are looked at for one with the same protocol


class _Next(NamedTuple):
    """The task that uses the result of a run."""

    words: tuple[str, ...]
    key: str = ""
    """Key that names the run for it."""
    needs: tuple[str, ...] = ()
    """Tasks with runs that it also reads."""
    always: bool = False
    """Whether the key must be given for the newest run too."""


_GENERATE = ("task=generate", _PROMPT)
_WITH_THE_NEWEST = _Next(_GENERATE, needs=("pretrain",))
_NEXT = {
    "vqvae": _Next(("task=tokenize",), "image_tokenizer.path"),
    "tokenize": _Next(("task=pretrain",), "data.token_store"),
    "pretrain": _Next(_GENERATE, "init_from"),
    "super_resolution": _Next(("task=magnify",), "upscale_with"),
    "style": _Next(("task=generate", _STYLED_PROMPT), "init_from", always=True),
    "caption": _Next(("task=rerank",), "rerank_with"),
    "features": _Next(("task=evaluate", "evaluate.metrics=[fid,toy]"), "evaluate.features", ("pretrain",)),
    "generate": _Next(("task=rerank",), "pairs", ("caption",), always=True),
    "magnify": _Next(
        ("task=generate", "upscale_with={outputs}/super_resolution/latest"), needs=("pretrain", "super_resolution")
    ),
    "rerank": _Next(
        ("task=generate", "rerank_with={outputs}/caption/latest", "num_images_per_prompt=8", "top_n=1"),
        needs=("pretrain", "caption"),
    ),
}


def next_command(folder: Path, config: DictConfig, words: Sequence[str]) -> str | None:
    """A whole command that uses the result of a run; None if there is no such task, or it would lack another run.

    Args:
        folder: of the finished run.
        config: its configuration.
        words: words of the command line that started it.
    """
    task, outputs = str(config.task), Path(config.outputs)
    following = _following(folder, config)
    if following is None or any(newest(outputs / needed / LATEST) is None for needed in following.needs):
        return None
    left_out = (f"{following.key}=", *(_OF_LOSSES if task in _BEFORE_TRAINING else _OF_TRAINING))
    words = [*config.common, *words] if is_chain(folder) else words
    if following.words[0].removeprefix("task=") in _FROM_MODEL_FOLDERS:
        left_out += OF_MODEL_FOLDERS
    kept = [word for word in words if _group(word) in _KEPT_GROUPS and not word.startswith(left_out)]
    repeated = tuple(f"{word.partition('=')[0]}=" for word in kept)
    own = [word for word in _suited(following.words, config, kept) if not word.startswith(repeated)]
    given = [word.replace("{outputs}", str(config.outputs)) for word in own]
    if following.key and (following.always or newest(outputs / task / LATEST) != folder.resolve()):
        given.append(f"{following.key}={folder}")
    return command([*given[:1], *(_PLAIN.sub(r"\1", word) for word in kept), *given[1:]])


def _suited(words: Sequence[str], config: DictConfig, kept: Sequence[str]) -> list[str]:
    """The words, in which captions of the user's own validation images take the place of a prompt of the toy world."""
    data = next((word for word in reversed(kept) if word.startswith("data=")), _TOY)  # a chain gives it to its stages
    if data == _TOY and OmegaConf.select(config, "data._target_", default=TOY_WORLD) == TOY_WORLD:
        return list(words)
    own = [word for word in words if word not in (_PROMPT, _STYLED_PROMPT)]
    if _STYLED_PROMPT in words and not any(word.startswith("data.style_patterns=") for word in kept):
        own.append(f"data.style_patterns=[{','.join(map(_item, config.data.style_patterns))}]")
    return own


def _group(word: str) -> str:
    """First part of the key, or of the group, of a word of the command line."""
    return re.split("[./=]", word.lstrip("+~"), maxsplit=1)[0]


def is_chain(folder: Path) -> bool:
    """Whether a finished run was a chain of tasks."""
    return (folder / REPORT).exists()


def _following(folder: Path, config: DictConfig) -> _Next | None:
    if is_chain(folder):
        return _WITH_THE_NEWEST
    if config.task == "tokenize" and config.token_store.part is not None:  # of a store that is not joined yet
        return None
    if config.task == "evaluate":
        return _after_evaluation(folder, Path(config.outputs), compares=config.evaluate.compare is not None)
    if config.task == "convert":
        return _after_conversion(config.convert.target)
    if config.task == "features" and not _is_toy_world(config):
        return _Next(("task=vqvae", "image_tokenizer/perceptual=features"), "image_tokenizer.perceptual.path")
    if config.task == "generate":
        return _after_generation(folder / SAMPLES)
    if config.task in ("style_transfer", "edit"):
        return _Next(("task=generate", *_pairs(config)), "init_from", always=True)
    return _NEXT.get(config.task)


def _pairs(config: DictConfig) -> list[str]:
    """Keys of the pairs that a model was trained on; task=generate has others by itself."""
    if config.task == "edit":
        return ["data.pairs=edits"] if _is_toy_world(config) else []
    lists = {name: OmegaConf.select(config.data, name) for name in ("styles", "style_patterns")}
    return [
        f"data.{name}=[{','.join(map(_item, values))}]"
        for name, values in lists.items()
        if isinstance(values, ListConfig)
    ]


def _is_toy_world(config: DictConfig) -> bool:
    from cogview_pl.assembly.image_data import is_toy_world  # imports torch

    return is_toy_world(config.data)


def _after_evaluation(folder: Path, outputs: Path, *, compares: bool) -> _Next:
    """A comparison with the newest earlier evaluation that has the same protocol; else more images."""
    if not compares:
        earlier = sorted((path.parent for path in (outputs / "evaluate").glob(f"*/{METRICS}")), reverse=True)
        others = [path for path in earlier if path.name != LATEST and path.resolve() != folder.resolve()]
        for other in others[:_EARLIER_EVALUATIONS]:
            if _comparable(other, folder):
                return _Next(("task=evaluate", f"evaluate.compare=[{_item(other)},{_item(folder)}]"))
    return _WITH_THE_NEWEST


def _comparable(first: Path, second: Path) -> bool:
    from cogview_pl.evaluation.protocol import compare  # imports torch

    try:
        return any(key.startswith("difference/") for key in compare([str(first), str(second)]))
    except UserError:
        return False


def _after_conversion(target: str) -> _Next | None:
    """The task that uses a model folder; None for a model in the released format."""
    from cogview_pl.checkpoints.model_folder import IMAGE_TOKENIZER, kind_of, read_model_settings  # imports torch
    from cogview_pl.vocab.roles import image_fields
    from cogview_pl.vocab.template import TextSlot, parse_slots

    try:
        kind = kind_of(target, "convert.target")
    except UserError:
        return None
    if kind == IMAGE_TOKENIZER:
        return _Next(("task=tokenize", f"image_tokenizer.path={target}"))
    template = read_model_settings(target, kind, "convert.target")["template"]
    (slot,) = (slot for slot in parse_slots(template["layout"], text_length=1) if slot.name == template["target"])
    if image_fields(template["layout"], template["target"]):  # it needs images
        return None
    if isinstance(slot, TextSlot):
        return _Next(("task=rerank", f"rerank_with={target}"), needs=("pretrain",))
    return _Next((*_GENERATE, f"init_from={target}"))


def _after_generation(samples: Path) -> _Next | None:
    """The task that ranks images; after captions an image of the first one that fits into a line; none after edits."""
    with samples.open(encoding="utf-8") as stream:
        for record in map(json.loads, stream):
            if "source" in record:  # its prompt is an instruction
                return None
            if "caption" not in record:
                return _NEXT["generate"]
            if record["caption"] and record["caption"].isprintable():
                return _Next(("task=generate", f"prompts=[{_item(record['caption'])}]"), needs=("pretrain",))
    return None


def _item(text: str | Path) -> str:
    """A text in a list of an override, in quotes where it has signs of the grammar."""
    return str(text) if _NEEDS_NO_QUOTES.fullmatch(str(text)) else quoted(str(text))
