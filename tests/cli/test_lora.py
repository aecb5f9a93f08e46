"""LoRA from the command line: files of a finetune, exact resume, and all uses of an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogview_pl import CogView

from .rewound import KEEP_ALL, last_checkpoint, require_same, rewind

LORA = ("lora.rank=4", "lora.alpha=8", "lora.targets=[qkv,down,tokens]")
STYLE = ("task=style", "data.styles=[oil,ink]", "model.dropout=0.1", "sequences.token_noise=0.2", *LORA, *KEEP_ALL)
PROMPT = "prompts=[左边有一个大的红色圆形的油画图像]"
RUNS = {
    "merged": STYLE,
    "alone": (*STYLE, "lora.merge=false"),
    "captioner": ("task=caption", "optimizer=muon", "activation_checkpointing=selective", *LORA, "lora.merge=false"),
    "upscaler": ("task=super_resolution", "precision=bf16", "optimizer=muon", *LORA, "lora.merge=false"),
}


@pytest.fixture(scope="module")
def home(cli, chain, tiny, tmp_path_factory) -> Path:
    """A folder with the outputs of the chain, and the folders of `RUNS`, made by LoRA in a few steps."""
    home = tmp_path_factory.mktemp("lora")
    shutil.copytree(chain.home / "outputs", home / "outputs", symlinks=True)
    ended = cli.run_many([([*args, *tiny, f"run_dir={name}"], home) for name, args in RUNS.items()], home)
    assert [run.code for run in ended] == [0] * len(RUNS), ended
    return home


def base(home: Path) -> Path:
    return home / "outputs" / "pretrain" / "latest"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "weights.safetensors")


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


def test_only_what_is_named_changes(chain, home: Path) -> None:
    before, after = weights(chain.run_folder("pretrain")), weights(home / "merged")
    assert weights(base(home)).keys() == before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, weights(base(home))[name])
        adapted = name == "token_embedding.weight" or name.endswith(("qkv.weight", "down.weight"))
        assert torch.equal(tensor, after[name]) != adapted, name


def test_an_adapter_alone_is_all_that_a_run_need_leave(home: Path) -> None:
    assert not (home / "alone" / "model").exists()
    found, same = adapter(home / "alone"), adapter(home / "merged")
    assert found.keys() == same.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in found.items())
    assert all(tensor.dtype == torch.float32 for tensor in adapter(home / "upscaler").values())
    assert all(tensor.abs().max() > 0 for tensor in found.values())  # B is no longer zero


def test_checkpoints_hold_what_is_trained_and_nothing_else(home: Path) -> None:
    for name in RUNS:
        checkpoint = last_checkpoint(home / name)
        assert {key.removeprefix("model.") for key in checkpoint["state_dict"]} == adapter(home / name).keys()
        assert sum(map(len, (state["state"] for state in checkpoint["optimizer_states"]))) == len(adapter(home / name))


def test_a_resumed_run_is_the_run_never_stopped(cli, home: Path, tiny, tmp_path: Path) -> None:
    rewind(home / "merged", tmp_path / "whole")
    other = [*STYLE, *tiny, "resume=merged"]
    cli.refuse(
        [
            ([*other, "lora.rank=3"], ["resume", "lora.rank=4", "this run has 3"]),
            ([*other, "lora.rank=0"], ["resume", "lora.rank=4", "this run has None"]),
            ([*other, "lora.alpha=3"], ["resume", "lora.alpha"]),
            ([*other, "init_from=alone"], ["resume", "init_from has changed"]),
        ],
        home,
        tmp_path,
    )
    [ended] = cli.run_many([(other, home)], tmp_path)
    assert ended.code == 0, ended
    require_same(tmp_path / "whole", home / "merged")


def test_adapters_paint_rank_and_enlarge(cli, home: Path, tmp_path: Path) -> None:
    cases = [
        [
            "task=generate",
            f"init_from={model}",
            PROMPT,
            "num_images_per_prompt=2",
            f"run_dir={tmp_path}/{number}",
            *more,
        ]
        for number, (model, more) in enumerate(
            [
                ("merged", []),
                ("alone", []),
                ("alone/adapter", ["rerank_with=captioner", "upscale_with=upscaler"]),
            ]
        )
    ]
    cases += [["task=convert", "convert.source=alone", f"convert.target={tmp_path}/whole/model"]]
    ended = cli.run_many([(case, home) for case in cases], tmp_path)
    assert [run.code for run in ended] == [0] * 4, ended
    images = [(tmp_path / run / "samples" / "0000" / "00.png").read_bytes() for run in "01"]
    assert images[0] == images[1]
    records = [json.loads(line) for line in (tmp_path / "2" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [record["width"] for record in records] == [128, 128]
    assert all(record["caption_loss"] > 0 for record in records)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(home / "merged")[name])
    by_python = [CogView.load(home / run, "cpu").generate("左边有一个大的红色圆形") for run in ("merged", "alone")]
    assert by_python[0][0].tobytes() == by_python[1][0].tobytes()


def test_a_finetune_may_start_from_an_adapter(cli, home: Path, tiny, tmp_path: Path) -> None:
    second = ["task=caption", "init_from=alone", *tiny, "lora.rank=2", "lora.merge=false", f"run_dir={tmp_path}/second"]
    ranked = ["task=rerank", f"rerank_with={tmp_path}/second", "num_prompts=2", "num_captions=2", "threads=1"]
    ended = cli.run_many([(second, home), (ranked, home)], tmp_path)
    assert [run.code for run in ended] == [0, 0], ended


def test_mistakes(cli, home: Path, tiny, tmp_path: Path) -> None:
    moved = shutil.copytree(home / "alone", tmp_path / "moved")
    (moved / "adapter" / "base.txt").write_text("/gone\n")
    style = ["task=style", "data.styles=[oil]", *tiny]
    cases = [
        (["task=pretrain", *tiny, "lora.rank=4"], ["lora.rank=4", "init_from"]),
        (["task=vqvae", *tiny, "lora.rank=4"], ["lora.rank=4", "sequence models"]),
        ([*style, "lora.rank=97"], ["lora.rank=97", "model.hidden_size=96"]),
        ([*style, "lora.rank=-1"], ["lora.rank=-1", "at least 0"]),
        ([*style, "lora.rank=4", "lora.alpha=0"], ["lora.alpha=0", "from 1e-9"]),
        ([*style, "lora.rank=4", "lora.targets=[]"], ["lora.targets=[]", "qkv, out, up, down"]),
        ([*style, "lora.rank=4", "lora.targets=[up,up]"], ["lora.targets", "twice"]),
        ([*style, "lora.rank=4", "lora.targets=[query]"], ["lora.targets", "query", "qkv"]),
        (["task=generate", f"init_from={moved}", PROMPT], ["init_from", "/gone", "does not exist", "base.txt"]),
        (["task=convert", f"convert.source={moved}", f"convert.target={tmp_path}/x"], ["convert.source", "/gone"]),
    ]
    cli.refuse(cases, home, tmp_path)
