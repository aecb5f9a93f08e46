"""Where prompts come from."""

from __future__ import annotations

import sys

import pytest

from cogview_pl.errors import UserError
from cogview_pl.tasks.generate import read_prompts

from ..composed import composed


def test_closed_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("task=generate", "prompts='-'")
    monkeypatch.setattr(sys, "stdin", None)  # what Python makes of `<&-`
    with pytest.raises(UserError, match="standard input is closed"):
        read_prompts(config)
