"""Sources of prompts."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest

from cogview_pl.assembly.prompts import prompts_or_captions, read_prompts
from cogview_pl.data.config import DataConfig
from cogview_pl.errors import UserError

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
ODD = f"一个{SEPARATORS}圆形"


def test_closed_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # Python sets this for `<&-`
    with pytest.raises(UserError, match="standard input is closed"):
        read_prompts("-")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_end_at_newlines_only(newline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"{ODD}{newline}{newline} 红色{newline}"
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_prompts(str(file)) == [ODD, "红色"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="utf-8"))
    assert read_prompts("-") == [ODD, "红色"]


@pytest.mark.parametrize(
    "text", ["红色的圆形", "红色的圆形，大的", "a dog's ball, a cat.", "1e3", "null", "a" * 5000, "a red/blue cat"]
)
def test_a_plain_text_is_one_prompt(text: str) -> None:
    assert read_prompts(text) == [text]


@pytest.mark.parametrize("name", ["nowhere.txt", "./nowhere", "~/nowhere", "/nowhere", "data/prompts"])
def test_the_name_of_a_file_that_is_not_there_is_no_prompt(name: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(name)


def test_home_and_names_like_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my prompts").write_text("红色\n")
    assert read_prompts("~/my prompts") == read_prompts("my prompts") == ["红色"]
    with pytest.raises(UserError, match="is a folder"):
        read_prompts("~")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a", "b"], "2 prompts: 'a', 'b' (a comma ends a prompt, except between quotes)"),
        (["a", "b", "c", "d"], "4 prompts: 'a', 'b', 'c', … (a comma ends a prompt, except between quotes)"),
        (["a"], "1 prompt: 'a'"),
        ("红色的圆形", "1 prompt: '红色的圆形'"),
        ("a, b", "1 prompt: 'a, b' (for several: prompts='[…, …]')"),
    ],
)
def test_what_was_understood_is_said(given: object, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        prompts_or_captions(given, DataConfig(), 1)
    assert caplog.messages == [said]
