"""The commands of docs/released-weights.md, word for word, on stand-ins for the released files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from ..released_files import make_release

PAGE = Path(__file__).parents[2] / "docs" / "released-weights.md"
SMALL = ("data.batch_size=2", "trainer.max_steps=2", "trainer.val_check_interval=2", "data.val_fraction=0.3")
HEADS = "model.num_heads=2"  # of stand-ins only: the heads of the published size are known


def commands() -> list[list[str]]:
    """Arguments of every command of the page, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python")]
    return [shlex.split(line)[3:] for line in lines]


def test_no_key_that_the_files_know() -> None:
    for words in commands():
        for word in words:
            assert not word.startswith(("model", "text", "image_tokenizer", "template", "compat")), word


def test_the_command_of_a_newcomer_ends_in_one_screen(cli, tmp_path: Path) -> None:
    ended = cli.run(["task=style", "model=cogview_4b"], tmp_path)
    first, *lines = ended.stderr.splitlines()
    assert ended.code == 2 and not ended.stdout and not (tmp_path / "outputs").exists()
    assert first.startswith("cogview_pl: task=style needs the weights of model=cogview_4b, and init_from is null")
    assert len(lines) <= 20 and any("experiment=cogview_4b_style_lora init_from=weights" in line for line in lines)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(cli, tmp_path: Path) -> None:
    make_release(tmp_path / "weights", num_positions=96)
    for name in ("oil", "images"):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.effect_noise((130, 130), 30 + number).convert("RGB").save(tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.txt").write_text("一只猫", encoding="utf-8")
    made = []
    for words in commands():
        finetunes = words[0].startswith("experiment=")
        released = any("weights" in word for word in words) and not words[1].endswith("tokenizer.pt")
        more = [*(SMALL if finetunes else ()), *([HEADS] if released else []), "threads=1"]
        ended = cli.succeed([*words, *more], tmp_path)
        made.append(ended.stdout)
        if finetunes and "plan=true" not in words:
            assert "init_from=weights/cogview-base decides model.num_layers=2" in ended.stderr + ended.stdout
        if words[0] == "task=generate":
            record = json.loads((tmp_path / "outputs/generate/latest/samples.jsonl").read_text().splitlines()[0])
            assert record["width"] == (128 if any(word.startswith("upscale_with") for word in words) else 64)
    assert "the run fits" in made[4]
    oil, base = (
        torch.load(tmp_path / f"{folder}/1/mp_rank_00_model_states.pt")["module"]
        for folder in ("oil_released", "weights/cogview-base")
    )
    assert {name: tensor.shape for name, tensor in oil.items()} == {name: t.shape for name, t in base.items()}
    adapted = {name for name, tensor in oil.items() if not torch.equal(tensor.float(), base[name].float())}
    assert len(adapted) == 2 * 4 and all(name.endswith("weight") for name in adapted)
