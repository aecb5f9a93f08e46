"""Options of evaluation: the schema of `evaluate` and `features`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cogview_pl.limits import MISSING, at_least_0, count, share, share_above_0


@dataclass
class TermsConfig:
    """The terms of captions that the network of task=features learns on data other than the toy world."""

    longest: int = count()
    min_share: float = share()
    max_share: float = share()
    max_terms: int = count()


@dataclass
class FeaturesConfig:
    """Size and training of the network of task=features."""

    epochs: int = count()
    lr: float = share_above_0()
    hidden_size: int = count()
    num_features: int = count()
    blur: float = at_least_0()
    noise: float = at_least_0()
    tint: float = at_least_0()
    terms: TermsConfig = field(default_factory=TermsConfig)


@dataclass
class EvaluateConfig:
    """Metrics of task=evaluate, and the networks and data that they need."""

    metrics: list[str] = MISSING
    features: str | None = None
    trust_features: bool = MISSING
    resolution: int | None = count(None)
    lpips: list[str] | None = None
    reference: str | None = None
    blur: list[float] = at_least_0()
    is_splits: int = count()
    base_style: str = MISSING
    compare: list[str] | None = None
