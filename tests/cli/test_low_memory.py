"""Low-memory optimizers and precisions from the command line: exact resume, and options that exclude each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .rewound import KEEP_ALL, require_same, rewind

BF16 = ("precision=bf16_true", "optimizer=adamw_8bit", "model.dropout=0.1", "sequences.token_noise=0.2")


@pytest.mark.slow
def test_8_bits_and_bf16_resume_exactly(cli, chain, tiny, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    args = ["task=pretrain", f"data.token_store={chain.run_folder('tokenize')}", *BF16, *tiny, *KEEP_ALL]
    run, whole = tmp_path / "run", tmp_path / "whole"
    [ended] = cli.run_many([([*args, "run_dir=run"], tmp_path)], tmp_path)
    assert ended.code == 0, ended
    rewind(run, whole)
    generation = [
        "task=generate",
        "init_from=run",
        "precision=bf16_true",
        "prompts=[红色]",
        "run_dir=generated",
        "threads=1",
    ]
    resumed, generated = cli.run_many([([*args, "resume=run"], tmp_path), (generation, tmp_path)], tmp_path)
    assert resumed.code == 0, resumed
    assert generated.code == 0, generated
    require_same(whole, run)
    assert {tensor.dtype for tensor in load_file(run / "model" / "weights.safetensors").values()} == {torch.bfloat16}


def test_what_does_not_go_together(cli, chain, tiny, tmp_path: Path) -> None:
    pretrain = ["task=pretrain", f"data.token_store={chain.run_folder('tokenize')}", *tiny]
    offload = [*pretrain, "optimizer=adamw_offload"]
    style = ["task=style", f"outputs={chain.home}/outputs", "run_dir=style", "data.styles=[oil]", *tiny]
    cases = [
        ([*pretrain, "precision=bf16_true"], ["precision=bf16_true", "optimizer=adamw_bf16"]),
        ([*pretrain, "precision=bf16_true", "optimizer=muon"], ["precision=bf16_true", "optimizer=adamw_8bit"]),
        ([*pretrain, "optimizer=adamw_bf16"], ["optimizer=adamw_bf16", "precision=bf16_true"]),
        (["task=vqvae", *tiny, "precision=bf16_true", "optimizer=adamw_8bit"], ["precision=bf16_true", "codebook"]),
        ([*style, *BF16, "lora.rank=4"], ["precision=bf16_true", "adapters", "precision=bf16,"]),
        ([*offload, "optimizer.gradient_clip=1"], ["optimizer.gradient_clip=1", "optimizer=adamw_offload"]),
        ([*offload, "trainer.devices=2"], ["optimizer=adamw_offload", "trainer.devices=1"]),
        ([*offload, "trainer.accumulate_grad_batches=2"], ["offload_gradients", "accumulate_grad_batches"]),
    ]
    if not torch.cuda.is_available():
        cases.append((offload, ["optimizer=adamw_offload", "CUDA"]))
    cli.refuse(cases, tmp_path, tmp_path)
