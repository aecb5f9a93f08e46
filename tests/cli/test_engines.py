"""The engine that decodes, through the command line: equal images, its record, and a run that goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .conftest import Chain, CommandLine
from .rewound import require_same_results, rewind_samples

FEW = ("sampler.temperature=0", "threads=1", "plan.strict=false", "seed=3")


def _lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_both_engines_write_the_same_results(cli: CommandLine, chain: Chain, tmp_path: Path) -> None:
    """Generated images, captions and magnified images; a run that was killed goes on with its engine only."""
    upscaler, captioner = (f"{chain.run_folder(task)}" for task in ("super_resolution", "caption"))
    tasks = {
        "generated": ["task=generate", f"init_from={chain.run_folder('pretrain')}", "num_prompts=4"],
        "captions": ["task=generate", f"init_from={captioner}", "num_prompts=4"],
        "magnified": ["task=magnify", f"upscale_with={upscaler}", "num_prompts=2"],
    }
    engines = ("torch", "compiled", "auto")
    commands = {
        f"{name}-{engine}": [*words, *FEW, f"sampler.engine={engine}", f"run_dir={tmp_path / f'{name}-{engine}'}"]
        for name, words in tasks.items()
        for engine in engines
    }
    for ended in cli.run_many([(words, chain.home) for words in commands.values()], tmp_path):
        assert ended.code == 0, ended.stderr[-3000:]
    for name in tasks:
        runs = {engine: tmp_path / f"{name}-{engine}" for engine in engines}
        images = {engine: [file.read_bytes() for file in sorted(run.rglob("*.png"))] for engine, run in runs.items()}
        assert images["compiled"] == images["torch"] and (images["torch"] or name == "captions")
        if name != "magnified":
            texts = {engine: [line.get("caption") for line in _lines(run)] for engine, run in runs.items()}
            assert texts["compiled"] == texts["torch"]
        used = [json.loads((run / ".cogview_pl.json").read_text(encoding="utf-8")) for run in runs.values()]
        assert [record["settings"]["sampler.engine"] for record in used] == ["torch", "compiled", "compiled"]

    run = tmp_path / "generated-compiled"
    goes_on, refused = tmp_path / "goes on", tmp_path / "refused"
    for copy in (goes_on, refused):
        shutil.copytree(run, copy)
        rewind_samples(copy, 2)
    whole, other = cli.run_many(
        [([f"resume={goes_on}"], tmp_path), ([f"resume={refused}", "sampler.engine=torch"], tmp_path)], tmp_path
    )
    assert whole.code == 0, whole.stderr[-3000:]
    require_same_results(run, goes_on)
    assert other.code == 2
    assert "begun with sampler.engine=compiled, this run has torch" in other.stderr
