"""Files of the package: `conf/`, and the experiments that become choices of `experiment=`."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

_PACKAGE = Path(__file__).parents[1]


def shipped(name: str) -> Path:
    """`conf/` or `experiments/`: next to the package in a checkout, inside it in an installed wheel."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def register_experiments(*, by_name_only: bool) -> None:
    """Register every `experiments/NAME/config.yaml` as the choice `experiment=NAME`.

    Experiments in the working folder replace shipped ones of the same name.

    Args:
        by_name_only: register empty configurations. This is faster, because Hydra copies all configurations many times
            for its help.
    """
    for root in dict.fromkeys((shipped("experiments"), Path("experiments").resolve())):
        for file in sorted(root.glob("*/config.yaml")):
            node = OmegaConf.create() if by_name_only else OmegaConf.load(file)
            ConfigStore.instance().store(group="experiment", name=file.parent.name, node=node, package="_global_")
