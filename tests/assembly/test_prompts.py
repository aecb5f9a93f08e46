"""Sources of prompts."""

from __future__ import annotations

import sys

import pytest

from cogview_pl.assembly.prompts import read_prompts
from cogview_pl.errors import UserError


def test_closed_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # Python sets this for `<&-`
    with pytest.raises(UserError, match="standard input is closed"):
        read_prompts("-")
