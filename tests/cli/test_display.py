"""What a run shows: its numbers, its images and the next command at the end, and no noise of libraries."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from cogview_pl.cli.next_command import next_command
from cogview_pl.cli.overrides import quote_override
from cogview_pl.cli.summary import table
from cogview_pl.cli.tensorboard import event_folders, link_runs
from cogview_pl.runs.aims import Aim, outcomes

REPOSITORY = Path(__file__).parents[2]


def next_words(stdout: str) -> list[str]:
    """Arguments of the command that the end of a run prints."""
    (command,) = re.findall(r"^  next  .*cogview_pl\.run (.*)$", stdout, re.MULTILINE)
    return shlex.split(command)


def test_a_chain_ends_with_its_aims_and_its_page(chain) -> None:
    """The values are those of the stages, and the bounds those of the recipe."""
    shown = chain.stdout[chain.stdout.index("aims reached") :].splitlines()[1:]
    aims = OmegaConf.load(REPOSITORY / "experiments" / "quickstart" / "config.yaml").aims
    rows = [line.split() for line in shown if re.search(r" (reached|missed)$", line)]
    assert [(row[0], row[1]) for row in rows] == [(aim.stage, aim.metric) for aim in aims]
    found = json.loads((chain.run_folder("rerank") / "metrics.json").read_text())
    (captions,) = [row for row in rows if row[0] == "found_captions"]
    assert captions[2:] == [f"{found['rerank/own_caption_top1']:.4g}", "≥", "0.95", captions[-1]]
    folder = chain.run_folder("quickstart").relative_to(chain.home)
    assert f"  open  {folder}/report.html" in shown
    assert next_words(chain.stdout)[0] == "task=generate"


def test_a_stage_shows_its_numbers_and_images_once(chain) -> None:
    folder = chain.run_folder("vqvae").relative_to(chain.home)
    assert chain.stdout.count(f"done: {folder} (") == 1
    assert chain.stdout.count(f"  open  {folder}/reconstructions.png") == 1
    stage = chain.stdout.split("done: ")[1]
    found = json.loads((chain.run_folder("vqvae") / "metrics.json").read_text())
    shown = dict(re.findall(r"(\w+/\w+) +([\d.e-]+)", stage))
    assert float(shown["eval/psnr"]) == float(f"{found['eval/psnr']:.4g}")
    assert not {name for name in shown if name.startswith(("lr-", "activations/", "train/", "codebook/batch_"))}


def test_no_noise_in_a_pipe(chain) -> None:
    """Neither carriage returns of progress bars nor messages of TensorBoard and Lightning."""
    assert "\r" not in chain.stdout
    assert "No path found" not in chain.stdout and "Epoch" not in chain.stdout
    statuses = [line for line in chain.stdout.splitlines() if line.endswith(" …")]
    assert len(statuses) == len(set(statuses))


def test_the_next_command_works_when_pasted(cli, tiny, tmp_path) -> None:
    """From the image tokenizer to images, with a run folder of its own on the way."""
    ended = cli.succeed(["task=vqvae", *tiny, "run_dir=first run"], tmp_path)
    for task in ("tokenize", "pretrain", "generate"):
        words = next_words(ended.stdout)
        assert words[0] == f"task={task}"
        training = [word for word in tiny if word.startswith("trainer.")] if task == "pretrain" else []
        ended = cli.succeed([*words, *training], tmp_path)
    assert (tmp_path / "outputs" / "generate" / "latest" / "samples" / "grid.png").exists()


@pytest.mark.slow
def test_next_commands_after_the_last_tasks(cli, chain, tiny, tmp_path) -> None:
    """Evaluations are compared with an earlier one, converted models are used."""
    shutil.copytree(chain.home / "outputs", tmp_path / "outputs", symlinks=True)
    for old in (tmp_path / "outputs" / "evaluate").iterdir():
        shutil.rmtree(old) if not old.is_symlink() else old.unlink()
    evaluation = ("task=evaluate", "pairs=outputs/generate/latest", "evaluate.metrics=[toy]", *tiny)
    cases = {
        "first": evaluation,
        "second": (*evaluation, "run_dir=second one"),
        "tokenizer": (
            "task=convert",
            "convert.source=outputs/vqvae/latest/checkpoints/last.ckpt",
            "convert.target=m 1",
        ),
        "model": ("task=convert", "convert.source=outputs/pretrain/latest/checkpoints/last.ckpt", "convert.target=m2"),
    }
    ended = dict(zip(cases, cli.run_many([(words, tmp_path) for words in cases.values()], tmp_path), strict=True))
    assert {name: result.code for name, result in ended.items()} == dict.fromkeys(cases, 0)
    following = {name: next_words(result.stdout) for name, result in ended.items()}
    assert following["first"][0] == "task=generate"
    assert following["second"][-1].startswith("evaluate.compare=[outputs/evaluate/")
    assert following["second"][-1].endswith(",second one]")
    assert following["tokenizer"][-1] == "image_tokenizer.path=m 1"
    assert following["model"][-1] == "init_from=m2"
    pasted = [(words, tmp_path) for words in following.values()]
    assert [result.stderr for result in cli.run_many(pasted, tmp_path) if result.code] == []


def test_a_caption_is_the_next_prompt(tmp_path) -> None:
    """The first one that fits into a line, exactly."""
    (tmp_path / "pretrain" / "latest").mkdir(parents=True)
    config = OmegaConf.create({"task": "generate", "outputs": str(tmp_path)})
    for captions, wanted in (
        (["a\nb", "一只'猫', [橘]"], "一只'猫', [橘]"),
        (["红色的圆形"], "红色的圆形"),
        (["\n"], None),
    ):
        records = (json.dumps({"file": "0.png", "caption": caption}) + "\n" for caption in captions)
        (tmp_path / "samples.jsonl").write_text("".join(records))
        command = next_command(tmp_path, config, ["task=generate"])
        if wanted is None:
            assert command is None
        else:
            word = shlex.split(command)[-1]
            assert OverridesParser.create().parse_override(quote_override(word)).value() == [wanted]


def test_the_next_command_has_only_the_quotes_that_it_needs(tmp_path) -> None:
    """A recipe quotes values for Hydra that need no quotes."""
    (tmp_path / "pretrain" / "latest").mkdir(parents=True)
    config = OmegaConf.create({"task": "pretrain", "outputs": str(tmp_path)})
    given = ["task=pretrain", "data.styles=['oil','sketch']", "data.caption_field='text'", "data.root='a, b'"]
    command = next_command(tmp_path / "pretrain" / "latest", config, given)
    assert command is not None
    assert "'data.styles=[oil,sketch]' data.caption_field=text" in command
    assert shlex.split(command)[-2] == "data.root='a, b'"


def test_the_next_command_suits_own_data_and_names_no_key_that_the_next_task_refuses(tmp_path) -> None:
    """Sizes of the model and of its text are in its folder; prompts of the toy world say nothing about own images."""
    (tmp_path / "pretrain" / "latest").mkdir(parents=True)
    data = {
        "_target_": "cogview_pl.data.webdataset.ShardDataset",
        "style_patterns": ["{text}，{style}", "{style}: {text}"],
    }
    sizes = ["model=tiny", "model.num_positions=140", "image_tokenizer.hidden_size=64", "text.vocab_size=512"]
    given = ["data=webdataset", "data.urls=a.tar", *sizes]

    def after(task: str) -> list[str]:
        values = {"task": task, "outputs": str(tmp_path), "data": data, "token_store": {"part": None}}
        config = OmegaConf.create(values)
        command = next_command(tmp_path / "pretrain" / "latest", config, [f"task={task}", *given])
        assert command is not None
        return shlex.split(command)[3:]

    assert after("tokenize")[:7] == ["task=pretrain", "data=webdataset", "data.urls=a.tar", *sizes]
    assert after("pretrain") == ["task=generate", "data=webdataset", "data.urls=a.tar", "model=tiny"]
    styled = after("style")
    assert styled[:4] == ["task=generate", "data=webdataset", "data.urls=a.tar", "model=tiny"]
    (patterns,) = [word for word in styled if word.startswith("data.style_patterns=")]
    assert OverridesParser.create().parse_override(quote_override(patterns)).value() == data["style_patterns"]


def test_the_next_command_after_a_chain_has_the_data_of_its_stages(tmp_path) -> None:
    (tmp_path / "outputs" / "pretrain" / "latest").mkdir(parents=True)
    (tmp_path / "report.html").touch()
    common = ["data=webdataset", "data.urls=a.tar", "optimizer=muon", "model.num_positions=140"]
    toy = {"_target_": "cogview_pl.toy_world.dataset.ToyDataset"}
    for given, wanted in (
        (common, ["task=generate", "data=webdataset", "data.urls=a.tar", "threads=1"]),
        ([], ["task=generate", "threads=1", "prompts=[左上角有一个大的红色圆形]"]),
    ):
        values = {"task": "mine", "outputs": str(tmp_path / "outputs"), "data": toy, "common": given}
        command = next_command(tmp_path, OmegaConf.create(values), ["experiment=mine", "threads=1"])
        assert command is not None and shlex.split(command)[3:] == wanted


def test_the_table_fits_the_terminal() -> None:
    metrics = {f"eval/metric_{number}": number / 7 for number in range(9)}
    for width in (20, 80, 120):
        lines = table(metrics, width)
        assert all(len(line) <= max(width, 2 + 13 + 2 + 6) for line in lines)
        assert re.findall(r"eval/metric_\d", "\n".join(lines)).__len__() == 9
    assert len(table(metrics, 120)) < len(table(metrics, 80)) < len(table(metrics, 20)) == 9


def test_numbers_are_short() -> None:
    values = {"a": 12739.64, "b": 3.14159, "c": 1e-7, "d": 2_000_000, "e": float("nan"), "f": 1.5e20}
    cells = [row.split()[1] for row in table(values, 20)]
    assert cells == ["12,740", "3.142", "1e-07", "2,000,000", "nan", "150,000,000,000,000,000,000"]


def test_bounds_of_aims() -> None:
    stages = {"ranked": {"best_of_1": 0.8, "oracle": 1.0, "best_of_8": 0.9}, "large": {"error": float("nan")}}
    aims = [
        Aim("ranked", "best_of_8", at_least=0.0, plus={"best_of_1": 0.5, "oracle": 0.5}),
        Aim("ranked", "best_of_8", at_most=0.5),
        Aim("large", "error", at_most=1.0),
        Aim("ranked", "not measured", at_least=1.0),
        Aim("no such stage", "error", at_least=1.0),
    ]
    found = outcomes(aims, stages)
    assert [(one.value == 0.9, one.bound, one.reached) for one in found] == [
        (True, 0.9, True),
        (True, 0.5, False),
        (False, 1.0, False),
    ]


def test_tensorboard_has_every_run_once(chain, tmp_path) -> None:
    """TensorBoard follows `latest`; the view of the runs does not have it."""
    found = event_folders(chain.home / "outputs")
    tasks = ("vqvae", "pretrain", "super_resolution", "style", "caption")
    assert found == {f"{task}/{chain.run_folder(task).name}": chain.run_folder(task) / "tensorboard" for task in tasks}
    for _ in range(2):  # as new runs come
        link_runs(chain.home / "outputs", tmp_path)
    assert len(list(tmp_path.glob("*/*/events.*"))) == len(tasks)


def test_tensorboard_has_hyperparameters_and_captions(chain) -> None:
    events = EventAccumulator(str(chain.run_folder("pretrain") / "tensorboard"))
    events.Reload()
    contents = events.PluginTagToContent("hparams")
    values = HParamsPluginData.FromString(contents["_hparams_/session_start_info"]).session_start_info.hparams
    assert values["optimizer.optimizer.lr"].number_value == 8e-3 and values["trainer.max_steps"].number_value == 6
    names = {
        info.name.tag for info in HParamsPluginData.FromString(contents["_hparams_/experiment"]).experiment.metric_infos
    }
    assert names >= {"val/loss", "val/loss_image"}
    (text, *_) = events.Tensors("val/samples_captions/text_summary")
    assert text.step == 3 and text.tensor_proto.string_val[0].decode().startswith("1. ")
