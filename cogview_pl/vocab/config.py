"""Options of the text tokenizer and of sequence layouts: `conf/text`, `conf/template` and `conf/compat`."""

from __future__ import annotations

from dataclasses import dataclass

from cogview_pl.limits import MISSING, at_least_0, count, share_above_0


@dataclass
class TextConfig:
    """The text tokenizer."""

    model: str | None = None
    vocab_size: int = count()
    model_type: str = MISSING
    character_coverage: float = share_above_0()
    max_length: int = count()


@dataclass
class TemplateConfig:
    """The layout of a sequence."""

    layout: str = MISSING
    target: str = MISSING
    loss: dict[str, float] = at_least_0()
    restart_positions_at: str | None = None


@dataclass
class CompatConfig:
    """Quirks of the original program."""

    restart_after_token: bool = MISSING
    loss_by_input: bool = MISSING
    loss_over_vocabulary: bool = MISSING
    end_of_text: str = MISSING
