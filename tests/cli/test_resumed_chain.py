"""A chain that was stopped goes on in the stage where it was stopped, and repeats no finished stage."""

from __future__ import annotations

import json
from pathlib import Path

from .rewound import last_checkpoint

RECIPE = """
defaults:
  - override /task: chain
task: mini
common: [data.batch_size=4, data.val_size=4, data.train_size=16, image_tokenizer.quantize_after_steps=1, seed=7]
stages:
  first: [task=vqvae, trainer.max_steps=2, optimizer=muon]
  second: [task=vqvae, trainer.max_steps=4, trainer.val_check_interval=4]
"""
GIVEN = ("logger=none", "threads=1", "plan.strict=false")
STOP = ("+callbacks.signal._target_=tests.cli.signalling.SignalAt", "+callbacks.signal.step=3")


def test_a_chain_goes_on_in_its_stage(cli, tmp_path: Path) -> None:
    (tmp_path / "experiments" / "mini").mkdir(parents=True)
    (tmp_path / "experiments" / "mini" / "config.yaml").write_text(RECIPE)
    chain, stages = tmp_path / "outputs" / "mini", tmp_path / "outputs" / "vqvae"
    stopped = cli.run(["experiment=mini", *GIVEN, *STOP], tmp_path)
    assert stopped.code == 143, stopped.stderr
    (folder,) = (path for path in chain.iterdir() if path.is_dir())
    assert stopped.stderr.endswith(f"-m cogview_pl.run resume=outputs/mini/{folder.name}\n"), stopped.stderr
    noted = json.loads((folder / "chain.json").read_text())
    first, second = (noted["stages"][name] for name in ("first", "second"))
    assert noted["words"] == [*GIVEN, *STOP] and first["metrics"] and second["metrics"] is None

    whole = ["task=vqvae", "run_dir=whole", "trainer.max_steps=4", "trainer.val_check_interval=4", "seed=7"]
    data = ["data.batch_size=4", "data.val_size=4", "data.train_size=16", "image_tokenizer.quantize_after_steps=1"]
    again = [f"resume=outputs/mini/{folder.name}"]  # a whole command
    ended = cli.run_many([(again, tmp_path), (again, tmp_path), ([*whole, *data, *GIVEN], tmp_path)], tmp_path)
    assert [result.code for result in ended] == [0, 0, 0], ended
    assert f"first had finished: {first['folder']}" in ended[0].stdout
    assert "has finished, and nothing is left to do" in ended[1].stdout
    runs = {path.name for path in stages.iterdir() if path.name != "latest"}
    assert runs == {Path(first["folder"]).name, Path(second["folder"]).name}
    assert not (tmp_path / first["folder"] / "config.resumed-2.yaml").exists()
    resumed = tmp_path / second["folder"]
    assert (resumed / "config.resumed-2.yaml").exists() and last_checkpoint(resumed)["global_step"] == 4
    weights = "model/weights.safetensors"
    assert (resumed / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert (chain / "latest" / "report.html").exists()
    assert set(json.loads((folder / "metrics.json").read_text())) >= {"perf/first_s", "perf/second_s", "eval/psnr"}
