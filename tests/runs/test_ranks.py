"""Rank of a process: environment variables count only if their launcher is running."""

from __future__ import annotations

import os

import pytest

from cogview_pl.errors import UserError
from cogview_pl.runs import ranks

CASES: dict[str, tuple[dict[str, str], tuple[int, int], list[str]]] = {
    "nothing": ({}, (0, 1), []),
    "torchrun": ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2), []),
    "srun": ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2), []),
    "a shell in a SLURM job": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, (0, 1), []),
    "left by Lightning": ({"LOCAL_RANK": "1"}, (0, 1), ["LOCAL_RANK"]),
    "left by another launcher": ({"LOCAL_RANK": "1", "COGVIEW_PL_LAUNCHER": "1"}, (0, 1), ["LOCAL_RANK"]),
    "started by our launcher": ({"LOCAL_RANK": "1", "COGVIEW_PL_LAUNCHER": str(os.getppid())}, (1, 1), []),
    "left by SLURM": (
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "1", "SLURM_NODEID": "3"},
        (0, 1),
        ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODEID"],
    ),
    "no number": ({"LOCAL_RANK": "one"}, (0, 1), ["LOCAL_RANK"]),
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("SLURM", "TORCHELASTIC", "COGVIEW_PL")) or name.endswith("RANK") or name == "WORLD_SIZE":
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("case", CASES)
def test_only_launchers_are_believed(
    environment: pytest.MonkeyPatch, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    variables, wanted, forgotten = CASES[case]
    for name, value in variables.items():
        environment.setenv(name, value)
    found = ranks._these()
    assert (found.rank, found.size) == wanted
    ranks.forget_stale_variables()
    said = capsys.readouterr().err
    for name in variables:
        assert (name not in os.environ) == (name in forgotten) == (f"{name}={variables[name]} is ignored" in said)


def test_a_node_that_the_run_does_not_have_is_refused(environment: pytest.MonkeyPatch) -> None:
    """Otherwise the process would treat itself as one of several and let another one write."""
    environment.setenv("NODE_RANK", "1")
    ranks.require_node(2)
    with pytest.raises(UserError, match=r"NODE_RANK=1 is set, and the run has trainer.num_nodes=1"):
        ranks.require_node(1)
