"""An earlier configuration on top of one that is composed now."""

from __future__ import annotations

from omegaconf import OmegaConf

from cogview_pl.config.continuation import take_over


def test_values_that_are_missing_come_in_their_order() -> None:
    stages = {f"stage_{number}": [f"seed={number}"] for number in (3, 1, 4, 15, 9, 2, 6, 5)}
    composed = OmegaConf.create({"stages": {}, "seed": 0})
    take_over(composed, {"stages": stages, "seed": 7}, own=[])
    assert list(composed.stages.items()) == list(stages.items()) and composed.seed == 7
