"""Command-line words as people type them → words that Hydra's override grammar accepts.

The grammar takes only ASCII letters and a few signs outside quotes: Chinese prompts and shard patterns such as
`DIR/{000..009}.tar` would need a second pair of quotes inside the shell's. They are put in here.
"""

from __future__ import annotations

import re

_QUOTES = "'\""
_COMMA = re.compile(r",(?![^{]*\})")  # outside braces
_MAPPING = re.compile(r"\{(.*:.*)?\}")


def quote_override(word: str) -> str:
    """`key=value` with the value quoted where the grammar needs it; anything else as it is.

    `prompts=[红色的圆形,蓝色的心形]` → `prompts=["红色的圆形","蓝色的心形"]`. A value that holds quotes already is left
    alone.
    """
    key, equals, value = word.partition("=")
    if not equals or any(quote in value for quote in _QUOTES):
        return word
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{','.join(map(_quote, _COMMA.split(value[1:-1])))}]"
    return f"{key}={_quote(value)}"


def _quote(value: str) -> str:
    readable = "{" not in value or value.lstrip().startswith(("${", "[")) or _MAPPING.fullmatch(value.strip())
    return value if value.isascii() and readable else f'"{value.strip()}"'
