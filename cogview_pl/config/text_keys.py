"""Keys whose values are texts or paths. The command line takes their values as they are typed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

_REFERENCE = re.compile(r"(\\*)\$\{")


@dataclass(frozen=True)
class TextKey:
    """How the command line reads the value of a key; null is always the empty value, not a text.

    Attributes:
        path: `~` at the start of a value is the home folder.
        several: `[A,B]` is a list. Otherwise brackets belong to the text.
        named: `{NAME: A, NAME: B}` is a mapping.
        literal: `${…}` is text. Otherwise it is the value of another key.
        constants: values in lower case that are no texts.
    """

    path: bool = True
    several: bool = False
    named: bool = False
    literal: bool = False
    constants: frozenset[str] = frozenset({"null"})


_PATH = TextKey()
_PATHS = TextKey(several=True)
_TEXT = TextKey(path=False)
_TEXTS = TextKey(path=False, several=True, literal=True)

TEXT_KEYS = {
    "outputs": _PATH,
    "run_dir": _PATH,
    "init_from": _PATH,
    "rerank_with": _PATH,
    "upscale_with": _PATH,
    "resume": TextKey(constants=frozenset({"null", "true", "false"})),
    "prompts": _TEXTS,  # `read_prompts` expands the path of a file
    "images": _PATHS,
    "pairs": _PATH,
    "font": _PATH,
    "complete.keep": _TEXT,
    "complete.mask": _PATH,
    "image_tokenizer.path": _PATH,
    "text.model": _PATH,
    "data.root": _PATH,
    "data.urls": _PATHS,
    "data.val_urls": _PATHS,
    "data.token_store": _PATH,
    "data.styles": TextKey(several=True, named=True),
    "data.style_patterns": _TEXTS,
    "data.style_field": _TEXT,
    "data.caption_field": _TEXT,
    "sequences.replay_store": _PATH,
    "convert.source": _PATH,
    "convert.target": _PATH,
    "evaluate.features": _PATH,
    "evaluate.lpips": _PATHS,
    "evaluate.reference": _PATH,
    "evaluate.compare": _PATHS,
    "evaluate.base_style": _TEXT,
    "template.layout": _TEXT,
    "template.restart_positions_at": _TEXT,
    "rerank_template.layout": _TEXT,
    "upscale_template.layout": _TEXT,
}


def expand_home(config: DictConfig) -> None:
    """Replace `~` and `~USER` at the start of paths by the home folder."""
    for key, form in TEXT_KEYS.items():
        value = OmegaConf.select(config, key) if form.path else None
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        expanded = _expanded(plain)
        if expanded != plain:
            OmegaConf.update(config, key, expanded, merge=False)


def _expanded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _expanded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_expanded(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def literal(value: Any) -> Any:
    """The value with `${` in its texts escaped, so that OmegaConf reads the texts as they are."""
    if isinstance(value, dict):
        return {name: literal(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    return _REFERENCE.sub(lambda found: rf"{2 * found[1]}\${{", value) if isinstance(value, str) else value
