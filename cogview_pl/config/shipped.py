"""Files of the package: `conf/`, and the experiments that become choices of `experiment=`."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def shipped(name: str) -> Path:
    """`conf/` or `experiments/`: next to the package in a checkout, inside it in an installed wheel."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def experiments() -> dict[str, Path]:
    """Name → `experiments/NAME/config.yaml`; those in the working folder replace shipped ones of the same name."""
    roots = (shipped("experiments"), Path("experiments").resolve())
    return {file.parent.name: file for root in roots for file in sorted(root.glob("*/config.yaml"))}
