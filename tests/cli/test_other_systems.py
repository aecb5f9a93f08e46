"""Windows and macOS, simulated: every module and runs need nothing that only POSIX or Linux has, and no float64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).with_name("other_systems.py")


def test_every_module_and_a_run_work_without_posix(cli, chain, tiny, tmp_path) -> None:
    """Without links `latest` is a file, and later tasks, paths and runs go through it."""
    trains = [*tiny, "trainer.max_steps=3", "data.num_workers=0", "~callbacks.progress"]
    store = f"data.token_store={chain.run_folder('tokenize')}"
    cases = [
        ["task=vqvae", *trains],
        ["task=vqvae", "+trainer.fast_dev_run=true", *trains],
        ["task=tokenize", *tiny, "image_tokenizer.path=outputs/vqvae/latest/model", "data.num_workers=1"],
        ["task=pretrain", store, *trains],
        ["task=generate", "init_from=outputs/pretrain/latest", "prompts=[红色]", "threads=1"],
        ["task=generate", "init_from=outputs/gone/latest", "prompts=[红色]", "threads=1"],
        ["task=tokenize", "data=hf", "data.name=x", "image_tokenizer.path=outputs/vqvae/latest/model"],
    ]
    ended = subprocess.run(
        [sys.executable, DRIVER, json.dumps(cases)], cwd=tmp_path, env=cli.environment, text=True, capture_output=True
    )
    codes = [line for line in ended.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 0"] * 5 + ["exit code 2"] * 2, ended.stderr[-4000:]
    for task in ("vqvae", "tokenize", "pretrain", "generate"):
        latest = tmp_path / "outputs" / task / "latest"
        run = min(path for path in latest.parent.iterdir() if path != latest)  # the first one, before the trial
        assert latest.is_file() and not latest.is_symlink() and latest.read_text() == f"{run.name}\n"
        assert (run / "metrics.json").is_file() and not (run / ".lock").exists()
    assert len(list((tmp_path / "outputs" / "vqvae").iterdir())) == 3
    assert "outputs/gone/latest does not exist" in ended.stderr
    assert 'data=hf needs datasets; pip install "cogview_pl[hf]"' in ended.stderr  # it needs what is not there
