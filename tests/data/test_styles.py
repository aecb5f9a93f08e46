"""Patterns that name the style in a caption."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from cogview_pl.data.styles import StylePatterns, check_present
from cogview_pl.errors import UserError


def test_each_key_keeps_one_of_the_patterns() -> None:
    patterns = StylePatterns(["{text}的{style}图像", "{style}风格的{text}", "{style}：{text}"])
    texts = [patterns.apply("猫", "油画", str(number)) for number in range(3000)]
    counts = Counter(texts)
    assert set(counts) == {"猫的油画图像", "油画风格的猫", "油画：猫"}
    assert all(900 < count < 1100 for count in counts.values())
    assert texts == [patterns.apply("猫", "油画", str(number)) for number in range(3000)]


def test_captions_and_styles_may_hold_braces() -> None:
    assert StylePatterns(["{text}|{style}"]).apply("{style} {0}", "{text}", "k") == "{style} {0}|{text}"


def test_no_patterns_are_false() -> None:
    assert not StylePatterns([])
    assert StylePatterns(["{text}{style}"])


@pytest.mark.parametrize(
    "pattern",
    ["", "图像", "{text}", "{style}风格", "{text}{style}{place}", "{text}{}{style}", "{text}{0}{style}", "{text{style}",
     "{text}{style", "{text:>9}{style}", "{text!r}{style}", "{text.x}{style}", "{text}{style[0]}"],
)  # fmt: skip
def test_other_holes_are_refused(pattern: str) -> None:
    with pytest.raises(
        UserError, match=r"^data\.style_patterns: .* must have the holes \{text\} and \{style\}"
    ) as error:
        StylePatterns(["{text}的{style}图像", pattern])
    assert repr(pattern) in str(error.value) and "\n" not in str(error.value)


def test_a_style_that_the_data_lack_is_named_with_those_found() -> None:
    check_present(["油画"], ["油画", "素描"], "style")
    with pytest.raises(
        UserError, match=r"^data\.styles: no sample has the style '水墨'; data\.style_field=medium has: 素描$"
    ):
        check_present(["素描", "水墨"], ["素描", "", "素描"], "medium")
    with pytest.raises(UserError, match=r"has: none$"):
        check_present(["素描"], [], "medium")
    with pytest.raises(UserError, match=r"has: 000, .*019 …$"):
        check_present(["素描"], (f"{number:03d}" for number in range(500)), "medium")


def test_twenty_styles_are_named() -> None:
    names = [f"{number:02d}" for number in range(21)]
    for known, words in ((names[:20], ", ".join(names[:20])), (names, ", ".join(names[:20]) + " …")):
        with pytest.raises(UserError) as error:
            check_present(["水墨"], reversed(known), "medium")
        assert str(error.value).endswith(f"data.style_field=medium has: {words}")


def test_the_pattern_of_a_key_is_fixed_for_ever() -> None:
    patterns = StylePatterns(["a{text}{style}", "b{text}{style}", "c{text}{style}"])
    expected = "".join("abc"[_first_of_hash(f"pattern:{key}") * 3 >> 64] for key in range(40))
    assert "".join(patterns.apply("t", "s", str(key))[0] for key in range(40)) == expected
    assert expected.startswith("baccbcbcbbab")
    assert patterns.apply("t", "s", "0")[1:] == "ts"


def _first_of_hash(text: str) -> int:
    """64 bits."""
    return int(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:16], 16)
