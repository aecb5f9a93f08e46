"""Quotes command-line words, so that Hydra's grammar of overrides reads the value that was typed.

Outside of quotes that grammar takes ASCII letters and a few signs only, and turns `1e3` or `null` into numbers and
constants. The values of texts and paths (`config/text_keys.py`) are therefore always quoted; those of other keys only
where the grammar cannot read them. Quotes that a user types around a whole text are kept. Keys of a mapping cannot be
quoted, so `{油画: DIR}` becomes a call of the resolver `mapping` (`config/schema.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from cogview_pl.config.text_keys import TEXT_KEYS, TextKey, literal

_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_QUOTED_PART = re.compile(rf"({_QUOTED.pattern})\s*(?=[,:\]}}]|$)", re.DOTALL)
_MAPPING = re.compile(r"\{([^{}]*:.*)?\}", re.DOTALL)  # not {style}: {text}
_REFERENCE = re.compile(r"(\\*)\$\{")
_SWEEP = re.compile(r"(choice|glob|range|interval|sort|shuffle|tag)\(.*\)")
_MISSING = "???"  # OmegaConf's mark of a value that is not there
_OTHER = TextKey(path=False, several=True, named=True)  # keys that are no texts


def quote_override(word: str, *, sweeps: bool = False) -> str:
    """`key=value` with quotes around the value where the grammar needs them; other words do not change.

    `prompts=[红色的圆形,a dog's ball]` → `prompts=['红色的圆形','a dog\\'s ball']`. Quoted words stay.

    Args:
        word: a word of the command line.
        sweeps: whether `A,B` stands for two runs; otherwise such a comma belongs to the text.
    """
    key, equals, value = word.partition("=")
    if key == "plan" and value.lower() in ("true", "false"):  # the choices of this group look like booleans
        return f"{key}='{value.lower()}'"
    if not equals:
        return word
    form = TEXT_KEYS.get(key.lstrip("+~"))
    if form is None:
        return word if _is_readable(value) else f"{key}={_value(value.strip(), _OTHER)}"
    if sweeps and _SWEEP.fullmatch(value.strip()):
        return word
    if sweeps:
        return f"{key}={','.join(_value(part, form) for part in _parts(value, '[]{}', ',[{:'))}"
    return f"{key}={_value(value.strip(), form)}"


def quoted(text: str) -> str:
    """A text in quotes: the grammar and OmegaConf read exactly this text."""
    return _in_quotes(literal(text))


def _in_quotes(text: str) -> str:
    return str(QuotedString(text, Quote.single).with_quotes())


def _value(value: str, form: TextKey) -> str:
    if value.lower() in form.constants:
        return value.lower()
    if form.several and value.startswith("[") and value.endswith("]"):
        parts = _parts(value[1:-1], "" if form.literal else "{}")
        return f"[{','.join(_text(part, form) for part in parts if part)}]"
    if form.named and _MAPPING.fullmatch(value):
        return _mapping(value[1:-1], form)
    return _text(value, form)


def _text(text: str, form: TextKey) -> str:
    """One text in quotes, or a value of another key that the grammar reads."""
    if _without_quotes(text) == _MISSING:
        return f"'{_MISSING} '"  # blanks around a text do not count
    if _QUOTED.fullmatch(text):
        return _REFERENCE.sub(_escaped_once, text) if form.literal else text
    if form is _OTHER and _is_readable(text):
        return text
    return quoted(text) if form.literal else _in_quotes(text)


def _escaped_once(found: re.Match[str]) -> str:
    """`${` within quotes with an odd number of backslashes, which makes it a text."""
    return found[0] if len(found[1]) % 2 else rf"{found[1]}\${{"


def _mapping(inside: str, form: TextKey) -> str:
    """`NAME: TEXT, NAME: TEXT` as a call that makes the mapping."""
    made = []
    for part in filter(None, _parts(inside, "{}", ",:")):
        colon = next((place for place in _outside_of_quotes(part, ",") if part[place] == ":"), len(part))
        name, text = _without_quotes(part[:colon].strip()), part[colon + 1 :].strip()
        made += [_in_quotes(name), text if form is _OTHER else _in_quotes(_without_quotes(text))]
    # Double quotes, because Hydra also keeps the word as it is, and OmegaConf must be able to parse that.
    return str(QuotedString(f"${{mapping:{','.join(made)}}}", Quote.double).with_quotes())


def _without_quotes(text: str) -> str:
    return re.sub(r"\\(['\"\\])", r"\1", text[1:-1]) if _QUOTED.fullmatch(text) else text


def _is_readable(value: str) -> bool:
    """Whether Hydra's grammar reads a value."""
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    return True


def _parts(text: str, brackets: str, before_quotes: str = ",") -> list[str]:
    """The text split at its commas, without blanks around the parts.

    Commas in a quoted part do not count, nor those between a pair of `brackets`; brackets without a partner are text.
    `before_quotes` are the signs after which a quoted part begins.
    """
    depth, start, parts = 0, 0, []
    for place in _outside_of_quotes(text, before_quotes):
        sign = text[place]
        if sign == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
        elif sign in brackets:
            depth += 1 if brackets.index(sign) % 2 == 0 else -1
            if depth < 0:
                return _parts(text, "")
    if depth:
        return _parts(text, "")
    return [part.strip() for part in (*parts, text[start:])]


def _outside_of_quotes(text: str, before_quotes: str) -> Iterator[int]:
    """Places of signs outside of quoted parts; a sign that ends a part follows its closing quote."""
    place, before = 0, ","
    while place < len(text):
        if before in before_quotes and (part := _QUOTED_PART.match(text, place)):
            place, before = part.end(1), "'"
            continue
        yield place
        if not text[place].isspace():
            before = text[place]
        place += 1
