"""Checkpoints that are not those of the run that goes on are refused in one line."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from cogview_pl.errors import UserError
from cogview_pl.tasks.resume import require_same_run

IDENTITY: dict[str, Any] = {"kind": "sequence_model", "settings": {"width": 96}, "inputs": {"data.store": "aa"}}
WHOLE: dict[str, Any] = {
    "state_dict": {"w": torch.zeros(2)},
    "optimizer_states": [{"state": {}}],
    "lr_schedulers": [],
    "loops": {"fit_loop": {}},
    "callbacks": {},
    "cogview_pl": {**IDENTITY, "metrics": {"val/loss": 0.5}},
}
CHANGES: dict[str, tuple[Any, str]] = {
    "no dictionary": ([1], "cannot be read"),
    "nothing of ours": ({"cogview_pl": None}, "cannot be read"),
    "a list of ours": ({"cogview_pl": [1]}, "cannot be read"),
    "no settings": ({"cogview_pl": {"kind": "sequence_model"}}, "it has no 'settings'"),
    "no optimizer": ({"optimizer_states": []}, "optimizer_states"),
    "no loops": ({"loops": {}}, "loops"),
    "no weights": ({"state_dict": [1]}, "state_dict"),
    "metrics without numbers": ({"cogview_pl": {**IDENTITY, "metrics": {"a": "x"}}}, "cannot be read"),
    "another stage": ({"cogview_pl": {**WHOLE["cogview_pl"], "kind": "image_tokenizer"}}, "of stage image_tokenizer"),
    "another model": ({"cogview_pl": {**WHOLE["cogview_pl"], "settings": {"width": 64}}}, "trained with width=64"),
    "other data": ({"cogview_pl": {**WHOLE["cogview_pl"], "inputs": {"data.store": "bb"}}}, "data.store is not what"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: str) -> None:
    content, words = CHANGES[change]
    torch.save({**WHOLE, **content} if isinstance(content, dict) else content, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=words) as error:
        require_same_run(tmp_path / "last.ckpt", IDENTITY, verify=True)
    assert "\n" not in str(error.value) and "last.ckpt" in str(error.value)


def test_what_fits_gives_its_metrics(tmp_path: Path) -> None:
    checkpoint = deepcopy(WHOLE)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert require_same_run(tmp_path / "last.ckpt", IDENTITY, verify=True) == {"val/loss": 0.5}
    others = {**IDENTITY, "inputs": {"data.store": "bb"}}
    assert require_same_run(tmp_path / "last.ckpt", others, verify=False) == {"val/loss": 0.5}
