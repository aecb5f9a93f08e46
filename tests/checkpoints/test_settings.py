"""Settings of folders of weights: plain values come back, anything else is told in one line that names the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from cogview_pl.checkpoints.settings import (
    CONFIG,
    from_plain,
    plain,
    read_settings,
    require_types,
    unfit_named,
    write_settings,
)
from cogview_pl.errors import UserError
from cogview_pl.limits import MISSING, at_least_0, count

SETTINGS = {
    "kind": "x",
    "number": 3,
    "rate": 2.5e-05,
    "none": None,
    "flags": [True, False],
    "inner": {"名": "红色", "empty": {}, "list": []},
}


def test_settings_come_back(tmp_path: Path) -> None:
    write_settings(tmp_path, SETTINGS)
    assert read_settings(tmp_path) == SETTINGS
    (tmp_path / CONFIG).write_text("7: a\nb: ${oc.env:HOME}\n")  # which stays what it says
    assert read_settings(tmp_path) == {"7": "a", "b": "${oc.env:HOME}"}


LARGEST, DEEPEST = 1 << 16, 16
ONE_MORE = DEEPEST + 1
GOOD: dict[str, str] = {
    "long": "a: 1\n#".ljust(LARGEST, "#"),
    "deep": "a: " + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1),
    "wide": "a: " + "[" + "[], {}, [{}]," * 40 + "]\nb: {}\nc:\n  - 1\nd:\n  e: 2\n",
    "deep blocks": "".join(f"{' ' * level}a:\n" for level in range(DEEPEST)),
}
BAD: dict[str, tuple[str, str]] = {
    "long": ("a: 1\n#".ljust(LARGEST + 1, "#"), "has 65,537 bytes, at most 65,536 are read; copy the folder again"),
    "deep": ("a: " + "[" * DEEPEST + "]" * DEEPEST, "is damaged (it is nested too deeply); copy the folder again"),
    "deep mappings": ("{a: " * ONE_MORE + "}" * ONE_MORE, "is damaged (it is nested too deeply)"),
    "deep blocks": ("".join(f"{' ' * level}a:\n" for level in range(ONE_MORE)), "it is nested too deeply"),
    "deep lists": ("- " * ONE_MORE + "1", "is damaged (it is nested too deeply)"),
    "alias": ("a: &x [1]\nb: *x\n", "is damaged (it uses YAML aliases); copy the folder again"),
    "list": ("- 1\n", "is damaged (it is no mapping)"),
    "no YAML": ("a: [", "is damaged (while parsing"),
    "no text": ("a: \udcff", "is damaged ('utf-8' codec"),
}


@pytest.mark.parametrize("title", GOOD)
def test_what_is_read(tmp_path: Path, title: str) -> None:
    (tmp_path / CONFIG).write_text(GOOD[title])
    assert "a" in read_settings(tmp_path)


@pytest.mark.parametrize("title", BAD)
def test_what_is_not(tmp_path: Path, title: str) -> None:
    content, words = BAD[title]
    (tmp_path / CONFIG).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        read_settings(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / CONFIG} ") and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("hidden_size"), "no 'hidden_size'"),
        (ValueError("two\n  lines"), "two lines"),
        (TypeError(), "TypeError"),
        (ValueError("x" * 301), "x" * 300),
        (UserError("a is 1: choose 2"), "a is 1: choose 2"),
        *((kind("why"), "why") for kind in (AttributeError, IndexError, OverflowError, AssertionError, RuntimeError)),
    ],
)
def test_what_constructors_raise_names_the_file(error: Exception, reason: str) -> None:
    with pytest.raises(UserError) as caught, unfit_named(Path("model/config.yaml")):
        raise error
    assert str(caught.value) == f"model/config.yaml is damaged ({reason}); copy the folder again"


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(KeyboardInterrupt), unfit_named(Path("config.yaml")):
        raise KeyboardInterrupt


def build(
    *,
    whole: int = 0,
    number: float = 0.0,
    flag: bool = False,
    text: str = "",
    maybe: str | None = None,
    numbers: Sequence[float] = (),
    named: Mapping[str, int] | None = None,
    anything: Any = None,
    undeclared=None,  # type: ignore[no-untyped-def]
) -> None:
    """A constructor."""


class Built:
    def __init__(self, whole: int) -> None:
        """Types of a class are those of its constructor."""


FITTING: list[dict[str, object]] = [
    {"whole": 3},
    {"number": 3},
    {"number": 2.5},
    {"flag": True},
    {"text": "a", "maybe": None, "undeclared": ..., "unknown": 1},
    {"maybe": "a", "numbers": [1, 2.5], "named": {"a": 1}},
    {"numbers": [], "named": {}, "anything": {1: ...}},
    {"named": None},
]
UNFITTING: list[tuple[str, object]] = [
    ("whole", 2.0),
    ("whole", True),
    ("whole", "3"),
    ("whole", None),
    ("number", "2.5"),
    ("number", False),
    ("flag", 1),
    ("text", 1),
    ("text", None),
    ("maybe", 1),
    ("numbers", [1.0, "a"]),
    ("numbers", 1.0),
    ("numbers", "12"),
    ("named", {"a": "b"}),
    ("named", [1]),
]


@pytest.mark.parametrize("arguments", FITTING, ids=str)
def test_arguments_of_the_declared_types(arguments: dict[str, object]) -> None:
    assert require_types(build, arguments) is arguments


@pytest.mark.parametrize(("name", "value"), UNFITTING, ids=str)
def test_arguments_of_other_types(name: str, value: object) -> None:
    with pytest.raises(ValueError) as error:
        require_types(build, {"number": 1, name: value} if name != "number" else {name: value})
    assert str(error.value) == f"{name} is {value!r}"


def test_arguments_of_classes() -> None:
    assert require_types(Built, {"whole": 1}) == {"whole": 1}
    with pytest.raises(ValueError, match=r"^whole is 1\.5$"):
        require_types(Built, {"whole": 1.5})


class Shape(Enum):
    round = "round"
    square = "square"


@dataclass
class Options:
    sides: int = count()
    shape: Shape = MISSING
    more: list[Shape] = MISSING
    scale: float | None = at_least_0()


PLAIN = {"sides": 4, "shape": "square", "more": ["round", "square"], "scale": None}


def test_options_become_plain_values_and_come_back() -> None:
    options = Options(sides=4, shape=Shape.square, more=[Shape.round, Shape.square], scale=None)
    assert plain(options) == PLAIN and from_plain(Options, PLAIN) == options
    options.extra = (Shape.round, {"inner": options.shape})  # type: ignore[attr-defined]
    assert plain(options) == {**PLAIN, "extra": ["round", {"inner": "square"}]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": "oval"}, "shape is 'oval'"),
        ({"shape": 1}, "shape is 1"),
        ({"shape": ["square"]}, r"shape is \['square'\]"),
        ({"more": ["oval"]}, r"more is \['oval'\]"),
        ({"more": "round"}, "more is 'round'"),
        ({"sides": 0}, "sides is 0, must be a whole number from 1 to 2147483647"),
        ({"sides": True}, "sides is True"),
        ({"scale": -0.5}, "scale is -0.5, must be 0, or from 1e-9 to 1e9"),
        ({"scale": float("inf")}, "scale is inf, must be 0, or from 1e-9 to 1e9"),
        ({"colour": 1}, "colour is unknown"),
        ({"_target_": "os.system"}, "_target_ is unknown"),
    ],
)
def test_options_that_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        from_plain(Options, {**PLAIN, **changes})


@pytest.mark.parametrize("name", PLAIN)
def test_a_missing_option_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^no {name}$"):
        from_plain(Options, {key: value for key, value in PLAIN.items() if key != name})
