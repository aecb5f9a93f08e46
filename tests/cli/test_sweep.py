"""Sweeps: a failing job is a row, the table is written, an objective feeds Optuna, launchers give the same."""

from __future__ import annotations

import csv
import importlib.util
import json
import shlex
import signal
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from .forked import Ended

JOB = (
    "task=vqvae",
    "trainer.max_steps=3",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "data.train_size=64",
    "data.val_size=8",
    "image_tokenizer.quantize_after_steps=1",
    "image_tokenizer.quantizer.kmeans_iters=1",
    "threads=1",
    "plan.strict=false",
    "~callbacks.progress",
)

TINY = (*JOB, "trainer.max_steps=2", "trainer.val_check_interval=2", "data.train_size=16", "data.batch_size=8")
PSNR = "sweep.metrics=[eval/psnr]"

CALLBACKS = """
    import optuna
    import torch
    from lightning import Callback


    class Memory(Callback):
        def on_train_start(self, trainer, module):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")


    class Broken(Callback):
        def on_train_start(self, trainer, module):
            raise KeyError("defect")


    class SecondIsPruned(Callback):
        started = 0

        def on_train_start(self, trainer, module):
            SecondIsPruned.started += 1
            if SecondIsPruned.started == 2:
                raise optuna.TrialPruned("it is behind the others")
"""
"""Callbacks of a user, in a file of the working folder."""

OPTUNA = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=0")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sweeps")
    (home / "mine.py").write_text(textwrap.dedent(CALLBACKS))
    study = home / "experiments" / "study" / "config.yaml"
    study.parent.mkdir(parents=True)
    study.write_text("hydra: {sweeper: {params: {seed: '0,1'}}}")
    return home


@pytest.fixture(scope="module")
def sweeps(cli, home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All sweeps of this file that can share a process."""
    rate = "optimizer.optimizer.lr=interval(0.0001,0.01)"
    commands = {
        "mixed": ("-m", *TINY, "optimizer=adamw,frog", "seed=0,-1", PSNR, "run_dir=mixed"),
        "again": ("-m", *TINY, "optimizer=adamw,frog", "seed=0,-1", PSNR, "run_dir=mixed", "resume=auto"),
        "taken": ("-m", *TINY, "seed=0,1", "run_dir=mixed"),
        "errors": ("-m", *TINY, "+callbacks.mine._target_=mine.Memory,mine.Broken", "run_dir=errors"),
        "optuna": (
            "-m",
            *(*TINY, *OPTUNA, rate, "+callbacks.mine._target_=mine.SecondIsPruned"),
            *("objective=eval/psnr", "hydra.sweeper.direction=maximize", "run_dir=optuna"),
        ),
        "all_fail": ("-m", *TINY, *OPTUNA, rate, "seed=-1", "objective=eval/psnr", "run_dir=all_fail"),
        "no_such_objective": ("-m", *TINY, "seed=0,1", "objective=val/loss", "run_dir=no_such_objective"),
        "needless": (*TINY, "experiment=study", "run_dir=needless"),
    }
    cases = [(words, home) for words in commands.values()]
    cases.append(
        (("-m", *TINY, "seed=choice(0)", f"outputs={home}/elsewhere"), Path("/proc"))
    )  # nobody can write there
    ended = cli.run_many(cases, tmp_path_factory.mktemp("scratch"))
    return dict(zip([*commands, "read_only"], ended, strict=True))


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_job_that_fails_is_a_row_with_its_reason(sweeps, home: Path) -> None:
    ended, rows = sweeps["mixed"], table(home / "mixed")
    assert ended.code == 1, ended.stderr
    assert list(rows[0]) == ["optimizer", "seed", "eval/psnr", "failed"]  # what varies, what was asked for
    assert [(row["optimizer"], row["seed"]) for row in rows] == [
        ("adamw", "0"),
        ("adamw", "-1"),
        ("frog", "0"),
        ("frog", "-1"),
    ]
    found = json.loads((home / "mixed" / "optimizer=adamw,seed=0" / "metrics.json").read_text())
    assert float(rows[0]["eval/psnr"]) == found["eval/psnr"] and rows[0]["failed"] == ""
    assert rows[1]["failed"] == "seed=-1 must be a whole number from 0 to 4294967295"
    for row in rows[2:]:
        assert row["failed"].startswith("optimizer=frog: there is no such choice") and row["eval/psnr"] == ""
    *printed, file = ended.stdout.splitlines()[-6:]
    assert printed[0].split() == ["optimizer", "seed", "eval/psnr"] and file == "table: mixed/sweep.csv"
    assert printed[1].split() == ["adamw", "0", f"{found['eval/psnr']:.4g}"]
    assert printed[2].split(maxsplit=3)[2:] == ["failed:", rows[1]["failed"]]
    assert {path.name for path in (home / "mixed").iterdir() if path.is_dir()} == {".jobs", "optimizer=adamw,seed=0"}
    assert not (home / "multirun.yaml").exists()


def test_a_sweep_goes_on_without_the_jobs_that_are_done(sweeps, home: Path) -> None:
    assert sweeps["again"].code == 1
    assert "done:" in sweeps["mixed"].stdout and "done:" not in sweeps["again"].stdout
    assert sweeps["again"].stdout.splitlines()[-6:] == sweeps["mixed"].stdout.splitlines()[-6:]
    assert sweeps["taken"].code == 2
    assert "run_dir=mixed holds an earlier sweep; go on with it by resume=auto" in sweeps["taken"].stderr


def test_no_memory_is_one_line_and_a_defect_has_its_traceback_too(sweeps, home: Path) -> None:
    memory, defect = table(home / "errors")
    assert sweeps["errors"].code == 1
    assert memory["failed"].startswith("out of memory; lower data.batch_size")
    assert defect["failed"] == "KeyError: 'defect'"
    assert sweeps["errors"].stderr.count("Traceback") == 1


def test_works_where_nothing_can_be_written(sweeps, home: Path) -> None:
    assert sweeps["read_only"].code == 0, sweeps["read_only"].stderr
    (sweep,) = (home / "elsewhere" / "vqvae").glob("*_sweep")
    assert (home / "elsewhere" / "vqvae" / "latest").resolve() == sweep / "seed=0"


def test_an_objective_that_the_task_does_not_have_ends_before_training(sweeps, home: Path) -> None:
    ended = sweeps["no_such_objective"]
    assert ended.code == 2 and ended.stderr.count("\n") == 1
    assert "objective=val/loss: task=vqvae has no such metric (did you mean val/loss_reconstruction" in ended.stderr
    assert not (home / "no_such_objective").exists()


def test_keys_to_sweep_need_the_option(sweeps, home: Path) -> None:
    assert sweeps["needless"].code == 2
    assert "hydra.sweeper.params names keys to sweep (seed); add -m" in sweeps["needless"].stderr


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs the extra optuna")
def test_optuna_gets_the_objective(sweeps, home: Path) -> None:
    ended, rows = sweeps["optuna"], table(home / "optuna")
    assert ended.code == 0, ended.stderr[-2000:]  # a pruned trial is no failure
    assert [row["failed"] for row in rows] == ["", "pruned: it is behind the others", ""]
    best = max((row for row in rows if not row["failed"]), key=lambda row: float(row["eval/psnr"]))
    found = yaml.safe_load((home / "optuna" / "optimization_results.yaml").read_text())
    key = "optimizer.optimizer.lr"
    assert found["best_value"] == float(best["eval/psnr"]) and found["best_params"][key] == float(best[key])
    assert f"best eval/psnr: {found['best_value']:.4g} with {key}={best[key]}" in ended.stdout


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs the extra optuna")
def test_a_study_without_any_value_ends_with_its_table(sweeps, home: Path) -> None:
    assert sweeps["all_fail"].code == 1
    assert [row["failed"] for row in table(home / "all_fail")] == [
        "seed=-1 must be a whole number from 0 to 4294967295"
    ] * 3
    assert "Traceback" not in sweeps["all_fail"].stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs the extra slurm")
def test_a_launcher_of_processes_gives_the_same_table(cli, sweeps, home: Path) -> None:
    words = ("-m", *TINY, "optimizer=adamw", "seed=0,-1", PSNR, "run_dir=launched")
    ended = cli.run([*words, "hydra/launcher=submitit_local"], home)
    assert ended.code == 1 and ended.stderr == ""
    rows = [dict(row) for row in table(home / "mixed")[:2]]  # those with optimizer=adamw
    assert [{"optimizer": "adamw", **row} for row in table(home / "launched")] == rows
    assert ended.stdout.splitlines()[-4].split() == ["seed", "eval/psnr"]


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_with_its_table_and_how_it_goes_on(cli, home: Path) -> None:
    words = ["-m", *TINY, "trainer.max_steps=2,1000000", PSNR, "run_dir=stopped"]
    process = cli.start(words, home)
    second = home / "stopped" / ".jobs" / "trainer.max_steps=1000000.json"
    deadline = time.monotonic() + 300
    while not second.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr[-2000:]
    done, stopped = table(home / "stopped")
    assert float(done["eval/psnr"]) > 5 and stopped["failed"] == "stopped"
    assert stdout.splitlines()[-1] == "table: stopped/sweep.csv"
    command = shlex.split(stderr.splitlines()[-1].partition("go on with ")[2])
    assert command[:4] == ["python", "-m", "cogview_pl.run", "-m"]
    assert command[-2:] == ["run_dir='stopped'", "resume=auto"] and "trainer.max_steps=2,1000000" in command


@pytest.mark.ddp
@pytest.mark.slow
def test_jobs_on_one_and_two_devices(cli, tmp_path: Path) -> None:
    swept = cli.succeed(["-m", *JOB, "strategy=ddp", "data.batch_size=4", "seed=0,1", "trainer.devices=1,2"], tmp_path)
    folders = sorted((tmp_path / "outputs" / "vqvae").glob("*_sweep/seed=*"))
    assert len(folders) == 4
    table = swept.stdout.splitlines()[-6:-1]
    assert table[0].split()[:2] == ["seed", "trainer.devices"] and "eval/psnr" in table[0]
    assert [line.split()[:2] for line in table[1:]] == [["0", "1"], ["0", "2"], ["1", "1"], ["1", "2"]]
    jobs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    found = {(job["seed"], job["trainer"]["devices"]): figures(path) for job, path in zip(jobs, folders, strict=True)}
    alone = [(seed, batch) for seed in (0, 1) for batch in (4, 8)]
    cases = [
        [*JOB, f"data.batch_size={batch}", f"seed={seed}", f"run_dir=alone_{seed}_{batch}"] for seed, batch in alone
    ]
    ended = cli.run_many([(words, tmp_path) for words in cases], tmp_path)
    assert [result.code for result in ended] == [0] * 4, ended
    expected = {(seed, batch // 4): figures(tmp_path / f"alone_{seed}_{batch}") for seed, batch in alone}
    assert found.keys() == expected.keys()
    for job, values in expected.items():
        assert found[job] == pytest.approx(values, rel=1e-4), job
    assert len({tuple(values.values()) for values in expected.values()}) == 4


def figures(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: metrics[name] for name in ("train/loss", "val/loss_reconstruction", "eval/psnr")}
