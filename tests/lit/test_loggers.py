"""Names of curves in TensorBoard, and packages of loggers."""

from __future__ import annotations

import sys

import pytest

from cogview_pl.errors import UserError
from cogview_pl.lit.loggers import curve_name, require_packages


def test_losses_come_before_other_curves() -> None:
    """TensorBoard sorts groups by name, and curves inside a group."""
    metrics = ["activations/group0_max", "codebook/usage", "eval/psnr", "lr-Muon/matrices", "perf/tokens_per_s"]
    metrics += ["train/bad_steps", "train/gradient_norm", "train/loss", "train/loss_image", "train/psnr", "val/loss"]
    names = sorted(curve_name(metric) for metric in metrics)
    assert names[:5] == ["train/loss", "train/loss_image", "train/psnr", "val/loss", "val/psnr"]
    assert names[5:7] == ["watch-activations/group0_max", "watch-codebook/usage"]
    assert [curve_name(name) for name in names] == names


@pytest.mark.parametrize(("kind", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_package_that_is_missing(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    wanted = rf'^logger={package} needs {package}; pip install "cogview_pl\[{package}\]"$'
    with pytest.raises(UserError, match=wanted):
        require_packages([{"_target_": f"lightning.pytorch.loggers.{kind}"}])
    require_packages([{"_target_": "cogview_pl.lit.loggers.LossesFirst"}])
