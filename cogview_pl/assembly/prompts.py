"""Prompts of a run: one text, a list, a text file, standard input, or captions of the validation split."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cogview_pl.assembly.image_data import validation_images
from cogview_pl.data.config import DataConfig
from cogview_pl.durable.read import UnreadableError, find, why_unusable
from cogview_pl.errors import UserError
from cogview_pl.runs.ranks import RANKS

_log = logging.getLogger(__name__)

_FILE = re.compile(r"(~|\.{0,2}/).*|.*\.[A-Za-z]\w{0,4}|[^\s/]+/[^\s/]\S*", re.ASCII | re.DOTALL)
"""Names of files: `~/a`, `./a`, `/a`, `a.txt`, `a/b`. Other texts that name no file are prompts."""
_SHOWN = 3  # prompts named in the log


def prompts_or_captions(given: object, data: DataConfig, count: int) -> list[str]:
    """The prompts that the user gives; None: the first `count` captions of the validation split."""
    if given is not None:
        prompts = read_prompts(given)
        if RANKS.first:
            _log.info(_said(given, prompts))
        return prompts
    source = validation_images(data)
    return [source.text(index) for index in range(min(count, len(source)))]


def _said(given: object, prompts: Sequence[str]) -> str:
    """What was read, because a comma may stand between prompts or in one."""
    some = ", ".join(map(repr, prompts[:_SHOWN])) + (", …" if len(prompts) > _SHOWN else "")
    if isinstance(given, str):
        hint = " (for several: prompts='[…, …]')" if "," in given and len(prompts) == 1 else ""
    else:
        hint = " (a comma ends a prompt, except between quotes)" if len(prompts) > 1 else ""
    return f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''}: {some}{hint}"


def read_prompts(given: object) -> list[str]:
    """Prompts from a list, a text file with one per line, `-` for standard input, or one prompt.

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
    """Lines of a file end at newlines only; a prompt may hold the other separators of Unicode."""
    if given == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise UserError("prompts=-: standard input is closed; pipe one prompt per line into the command")
        return sys.stdin.read().removeprefix("\ufeff").split("\n")
    if isinstance(given, str):
        file = Path(os.path.expanduser(given))
        if not _names_a_file(given, file):
            return [given]
        if (why := why_unusable(file)) != "is a file":
            raise UserError(
                f"prompts={given} {why}; give a text file, a list prompts='[一个红色的圆形]', or - for standard input"
            )
        try:
            return file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"prompts={given} is not UTF-8 text; save it as UTF-8") from None
    if isinstance(given, Sequence):
        return [str(prompt) for prompt in given]
    raise UserError(f"prompts={given} is no text; give a list prompts='[一个红色的圆形]', a text file, or -")


def _names_a_file(given: str, file: Path) -> bool:
    if _FILE.fullmatch(given):
        return True
    try:
        return find(file) is not None
    except UnreadableError:  # no name that a file can have, because it is too long
        return False
