"""Quotes command-line words, so that Hydra's grammar of overrides accepts them.

Outside of quotes the grammar takes only ASCII letters and a few signs. Chinese prompts and shard patterns such as
`DIR/{000..009}.tar` need quotes inside those of the shell; this file adds them. Keys of a mapping cannot be quoted, so
`{油画: DIR}` becomes a call of OmegaConf's resolver `oc.create`, which reads YAML.
"""

from __future__ import annotations

import re

_QUOTES = "'\""
_COMMA = re.compile(r",(?![^{]*\})")  # outside braces
_MAPPING = re.compile(r"\{([^{}]*:.*)?\}")  # not {style}: {text}


def quote_override(word: str) -> str:
    """`key=value` with quotes around the value if the grammar needs them; other words do not change.

    `prompts=[红色的圆形,蓝色的心形]` → `prompts=["红色的圆形","蓝色的心形"]`. A value with quotes stays.
    """
    key, equals, value = word.partition("=")
    if key == "plan" and value.lower() in ("true", "false"):  # the choices of this group look like booleans
        return f"{key}='{value.lower()}'"
    if not equals or any(quote in value for quote in _QUOTES):
        return word
    if not value.isascii() and _MAPPING.fullmatch(value.strip()):
        return f"{key}=\"${{oc.create:'{value.strip()}'}}\""
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{','.join(map(_quote, _COMMA.split(value[1:-1])))}]"
    return f"{key}={_quote(value)}"


def quoted(value: str) -> str:
    """A value in single quotes, with those inside it escaped."""
    return "'" + value.replace("'", "\\'") + "'"


def _quote(value: str) -> str:
    readable = "{" not in value or value.lstrip().startswith(("${", "[")) or _MAPPING.fullmatch(value.strip())
    return value if value.isascii() and readable else f'"{value.strip()}"'
