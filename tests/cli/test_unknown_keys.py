"""Unknown keys and choices end in one line with the nearest known ones, or with advice on how to add a key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

LISTED = "; `task=… --cfg job` lists all keys"
NO_ARGUMENT = (
    "trainer.max_step: lightning.Trainer has no such argument (did you mean trainer.max_steps or trainer.max_time?)"
)

LINES = {
    # by the last word
    "lr=1": f"lr: there is no such key (did you mean optimizer.optimizer.lr?){LISTED}",
    "optimizer.lr=1": f"optimizer.lr: there is no such key (did you mean optimizer.optimizer.lr?){LISTED}",
    "batch_size=3": (f"batch_size: there is no such key (did you mean data.batch_size or sampler.batch_size?){LISTED}"),
    "trainr.max_steps=3": f"trainr.max_steps: there is no such key (did you mean trainer.max_steps?){LISTED}",
    # by spelling
    "sed=1": f"sed: there is no such key (did you mean seed?){LISTED}",
    "model.layer=3": f"model.layer: there is no such key (did you mean model.num_layers?){LISTED}",
    "max_step=3": f"max_step: there is no such key (did you mean trainer.max_steps?){LISTED}",
    "sampler={topk: 3}": f"sampler.topk: there is no such key (did you mean sampler.top_k?){LISTED}",
    "data.foo.bar=3": f"data.foo.bar: there is no such key{LISTED}",
    # keys of a node that is null
    "image_tokenizer.adversarial.start=3": (
        "image_tokenizer.adversarial.start has no effect, because image_tokenizer.adversarial is null; choose "
        "image_tokenizer/adversarial=… (`--help` lists choices), or leave image_tokenizer.adversarial.start out"
    ),
    "evaluate.resolution=3": (
        "evaluate.resolution has no effect, because evaluate is null; choose the task that has it (`--help` lists "
        "choices), or leave evaluate.resolution out"
    ),
    # for nodes that accept any key, the message says how to add one
    "trainer.max_step=3": (
        "trainer.max_step: there is no such key (did you mean trainer.max_steps?); to add it: +trainer.max_step=3"
    ),
    "trainer.benchmark=true": "trainer.benchmark: there is no such key; to add it: +trainer.benchmark=true",
    "template.loss={second: 1.0}": (
        "template.loss exists and has text, image; to add second: +template.loss={second: 1.0}"
    ),
    "stages={a: [b]}": "stages exists and has no keys; to add a: +stages={a: [b]}",
    # added keys that nothing reads
    "+foo=1": "foo: there is no such key",
    "+model.foo=1": "model.foo: there is no such key",
    "+model.layer=1": "model.layer: there is no such key (did you mean model.num_layers?)",
    "++sampler.topk=1": "sampler.topk: there is no such key (did you mean sampler.top_k?)",
    "+trainer.max_step=3": NO_ARGUMENT,
    "+precision.plugin=[]": (
        "precision.plugin: lightning.Trainer has no such argument (did you mean precision.plugins?)"
    ),
    # choices
    "model=tny": (
        "model=tny: there is no such choice (did you mean model=tiny?); "
        "choices: base, cogview_400m, cogview_4b, small, tiny"
    ),
    "image_tokenizer/quantizer=emma": (
        "image_tokenizer/quantizer=emma: there is no such choice (did you mean image_tokenizer/quantizer=ema?); "
        "choices: cosine, custom, ema, fixed, fsq, gumbel, learned"
    ),
    "model.norm=sandwhich": (
        "model.norm=sandwhich: there is no such choice (did you mean model.norm=sandwich?); "
        "choices: pre, post, sandwich"
    ),
    "lora.targets=[qkv,tokns]": (
        "lora.targets[1]=tokns: there is no such choice (did you mean lora.targets[1]=tokens?); "
        "choices: qkv, out, up, down, tokens"
    ),
    # types
    "seed=abc": "seed=abc must be a whole number",
    "compile=perhaps": "compile=perhaps must be true or false",
    "sampler.top_p=high": "sampler.top_p=high must be a number",
    "modl=tiny": f"modl: there is no such key (did you mean model?){LISTED}",
}
"""Last word of the command line → line on standard error."""

FILES = {
    "unknown": ({"foo": 1}, f"In 'experiment/unknown': foo: there is no such key{LISTED}"),
    "misspelt": (
        {"model": {"num_layer": 1}},
        "In 'experiment/misspelt': model.num_layer: there is no such key (did you mean model.num_layers?)" + LISTED,
    ),
    "of_trainer": ({"trainer": {"max_step": 1}}, NO_ARGUMENT),
}
"""Experiments of the working folder: their values, and the line on standard error."""


def refused(cli, cases: list[list[str]], home: Path) -> list[str]:
    """Output of each case; each must end with exit code 2."""
    ended = cli.run_many([(case, home) for case in cases], home)
    assert [result.code for result in ended] == [2] * len(cases)
    return [result.stderr for result in ended]


def test_a_line_with_the_nearest_keys(cli, tmp_path: Path) -> None:
    found = refused(cli, [["task=pretrain", word] for word in LINES], tmp_path)
    assert found == [f"cogview_pl: {line}\n" for line in LINES.values()]
    assert not (tmp_path / "outputs").exists()


def test_unknown_keys_of_experiments(cli, tmp_path: Path) -> None:
    for name, (values, _) in FILES.items():
        (tmp_path / "experiments" / name).mkdir(parents=True)
        values = {"defaults": [{"override /task": "pretrain"}], **values}
        (tmp_path / "experiments" / name / "config.yaml").write_text(yaml.safe_dump(values))
    # Experiments stay registered in a process, so the other choices depend on what ran in it.
    found = [cli.run([f"experiment={name}"], tmp_path) for name in FILES]
    assert [(ended.code, ended.stderr) for ended in found] == [
        (2, f"cogview_pl: {line}\n") for _, line in FILES.values()
    ]


@pytest.mark.parametrize("flag", [["--config-dir", "own"], ["--config-dir=own"], ["-cd", "own"]], ids=" ".join)
def test_unknown_keys_of_a_file_of_the_users(flag: list[str], cli, tmp_path: Path) -> None:
    (tmp_path / "own" / "task").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - vqvae\n  - _self_\ndata:\n  batchsize: 3\n"
    (tmp_path / "own" / "task" / "mine.yaml").write_text(text)
    ended = cli.run([*flag, "task=mine"], tmp_path)
    line = f"In 'task/mine': data.batchsize: there is no such key (did you mean data.batch_size?){LISTED}"
    assert (ended.code, ended.stderr) == (2, f"cogview_pl: {line}\n")
