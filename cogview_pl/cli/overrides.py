"""Command-line words as people type them → words that Hydra's override grammar accepts.

The grammar takes only ASCII letters and a few signs outside quotes: Chinese prompts and shard patterns such as
`DIR/{000..009}.tar` would need a second pair of quotes inside the shell's. They are put in here. Keys of a mapping
cannot be quoted at all, so `{油画: DIR}` is left to OmegaConf's resolver `oc.create`, which reads YAML.
"""

from __future__ import annotations

import re

_QUOTES = "'\""
_COMMA = re.compile(r",(?![^{]*\})")  # outside braces
_MAPPING = re.compile(r"\{([^{}]*:.*)?\}")  # not {style}: {text}


def quote_override(word: str) -> str:
    """`key=value` with the value quoted where the grammar needs it; anything else as it is.

    `prompts=[红色的圆形,蓝色的心形]` → `prompts=["红色的圆形","蓝色的心形"]`. A value that holds quotes already is left
    alone.
    """
    key, equals, value = word.partition("=")
    if key == "plan" and value.lower() in ("true", "false"):  # a group, whose choices would be read as truth values
        return f"{key}='{value.lower()}'"
    if not equals or any(quote in value for quote in _QUOTES):
        return word
    if not value.isascii() and _MAPPING.fullmatch(value.strip()):
        return f"{key}=\"${{oc.create:'{value.strip()}'}}\""
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{','.join(map(_quote, _COMMA.split(value[1:-1])))}]"
    return f"{key}={_quote(value)}"


def quoted(value: str) -> str:
    """A value in quotes, whatever signs it holds."""
    return "'" + value.replace("'", "\\'") + "'"


def _quote(value: str) -> str:
    readable = "{" not in value or value.lstrip().startswith(("${", "[")) or _MAPPING.fullmatch(value.strip())
    return value if value.isascii() and readable else f'"{value.strip()}"'
