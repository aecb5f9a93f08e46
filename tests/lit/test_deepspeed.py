"""strategy=deepspeed_2 and deepspeed_3: what DeepSpeed is told, by its own schema. Runs need GPUs."""

from __future__ import annotations

import pytest

from cogview_pl.assembly.instantiate import instantiate

from ..composed import composed


@pytest.mark.parametrize("stage", [2, 3])
def test_configuration_is_what_deepspeed_knows(stage: int) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    options = [f"strategy=deepspeed_{stage}", "strategy.strategy.offload_optimizer=true"]
    strategy = instantiate(composed("task=pretrain", *options).strategy.strategy, "strategy.strategy")
    found = DeepSpeedZeroConfig(**strategy.config["zero_optimization"])
    assert found.stage == stage
    assert found.offload_optimizer is not None and found.offload_optimizer.device == "cpu"
    unknown = strategy.config["zero_optimization"].keys() - DeepSpeedZeroConfig.model_fields.keys()
    assert not {
        key for key in unknown if key not in {field.alias for field in DeepSpeedZeroConfig.model_fields.values()}
    }
