"""Prompts of a run: a list, a text file, standard input, or captions of the validation split."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cogview_pl.assembly.image_data import open_images
from cogview_pl.data.config import DataConfig
from cogview_pl.durable.read import why_unusable
from cogview_pl.errors import UserError


def prompts_or_captions(given: object, data: DataConfig, count: int) -> list[str]:
    """The prompts that the user gives; None: the first `count` captions of the validation split."""
    if given is not None:
        return read_prompts(given)
    source = open_images(data, "val")
    return [source.text(index) for index in range(min(count, len(source)))]


def read_prompts(given: object) -> list[str]:
    """Prompts from a list, a text file with one per line, or `-` for standard input.

    Raises:
        UserError: there are none, or the file cannot be read.
    """
    prompts = [line.strip() for line in _lines(given) if line.strip()]
    if not prompts:
        raise UserError(f"prompts={given} holds no text; give at least one prompt")
    for prompt in prompts:
        if any("\ud800" <= sign <= "\udfff" for sign in prompt):
            raise UserError(f"prompts: {prompt!r} is not valid Unicode; write it again")
    return prompts


def _lines(given: object) -> Sequence[str]:
    if given == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise UserError("prompts=-: standard input is closed; pipe one prompt per line into the command")
        return sys.stdin.read().splitlines()
    if isinstance(given, str):
        if not Path(given).is_file():
            raise UserError(
                f"prompts={given} {why_unusable(given)}; give a text file, a list prompts='[一个红色的圆形]', "
                "or - for standard input"
            )
        try:
            return Path(given).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"prompts={given} is not UTF-8 text; save it as UTF-8") from None
    if isinstance(given, Sequence):
        return [str(prompt) for prompt in given]
    raise UserError(f"prompts={given} is no text; give a list prompts='[一个红色的圆形]', a text file, or -")
