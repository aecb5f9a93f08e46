"""In a sweep over numbers of devices every job runs once, in one folder, with the same result as alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

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
    "~callbacks.progress",
)


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
