"""Files and folders from other people, with any content, never change the user's own files.

All attacks happen in a home folder with other files; the folder is compared byte for byte afterwards.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from cogview_pl.checkpoints.model_folder import load_sequence_model

from ..checkpoints.saved import forge_manifest
from ..texts import learned_text
from .conftest import COMMAND, Chain, CommandLine, Ended
from .rewound import require_same

pytestmark = pytest.mark.slow

FEW = ("trainer.max_steps=6", "trainer.val_check_interval=3", "threads=1", "plan.strict=false", "~callbacks.progress")
SMALL = ("data.train_size=64", "data.val_size=8", "data.batch_size=8")


class Address:
    """An array of objects whose addresses are the bytes of a file; reading an object crashes the process."""

    def __reduce__(self) -> tuple[object, ...]:
        return np.ndarray, ((1,), np.dtype("O"), b"AAAAAAAA")


def everything(home: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Path → mode, time of change, and content or target of every file and link below a folder."""
    found: dict[str, tuple[int, int, bytes | str]] = {}
    for parent, folders, files in os.walk(home):
        for name in (*folders, *files):
            entry = Path(parent, name)
            status = entry.lstat()
            if entry.is_symlink():
                found[str(entry)] = (status.st_mode, status.st_mtime_ns, os.readlink(entry))
            elif entry.is_file():
                found[str(entry)] = (status.st_mode, status.st_mtime_ns, entry.read_bytes())
            else:
                found[str(entry)] = (status.st_mode, 0, "")
    return found


@pytest.fixture(scope="module")
def home(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's project folder: results of a chain, own files, and downloaded files."""
    home = tmp_path_factory.mktemp("attacked") / "home"
    shutil.copytree(chain.home / "outputs", home / "outputs", symlinks=True)
    own = {
        "config.yaml": "my: own", "metrics.json": "[]", ".lock": "mine", "notes/.chapter1.draft": "Once upon a time",
        "samples.jsonl": "mine", "checkpoints/best.txt": "1", "victim/photo.txt": "a photo", "diary.txt": "dear diary",
        "project/checkpoints/notes.txt": "mine",
    }  # fmt: skip
    for name, text in own.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    return home


def newest(home: Path, task: str) -> Path:
    return (home / "outputs" / task / "latest").resolve()


def copied(home: Path, task: str, name: str) -> Path:
    """A copy of the newest run of a task, in place of a downloaded one."""
    return shutil.copytree(newest(home, task), home / name, symlinks=True)


# --- what is refused ---


def hostile_pickle(home: Path) -> tuple[list[str], list[str]]:
    with zipfile.ZipFile(home / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"module": Address()}, protocol=2))
        archive.writestr("evil/version", "3\n")
    return ["task=generate", "init_from=evil.pt", "prompts=[红色的圆形]"], ["init_from", "evil.pt"]


def hostile_base(home: Path) -> tuple[list[str], list[str]]:
    """A file as the claimed base of an adapter."""
    adapter = home / "adapter"
    adapter.mkdir()
    torch.save({}, adapter / "adapter.safetensors")
    (adapter / "base.txt").write_text(f"{home / 'evil.pt'}\n")
    (adapter / "config.yaml").write_text("kind: adapter\nlora: {rank: 1, alpha: 1, targets: [qkv]}\n")
    (adapter / "manifest.json").write_text("{}")
    forge_manifest(adapter)
    return ["task=generate", "init_from=adapter", "prompts=[红色的圆形]"], ["adapter"]


def hostile_program(home: Path) -> tuple[list[str], list[str]]:
    """TorchScript with names that only libtorch recognises as code."""

    class Writes(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :4]

    torch.jit.save(torch.jit.script(Writes()), home / "plain.pt")
    with zipfile.ZipFile(home / "plain.pt") as plain, zipfile.ZipFile(home / "inception_v3.pt", "w") as hidden:
        for name in plain.namelist():
            code = plain.read(name)
            if name.endswith(".py"):
                code = code.replace(b"    return", b'    torch.save("import os", "hydra.py")\n    return')
            hidden.writestr(name.replace("/code/", "/Code/").replace(".py", ".PY"), code)
    (home / "plain.pt").unlink()
    words = ["evaluate.features=inception_v3.pt", "evaluate.trust_features=true"]
    return ["task=evaluate", "evaluate.features=inception_v3.pt", "evaluate.metrics=[fid]"], words


def folder_of_somebody_else(home: Path) -> tuple[list[str], list[str]]:
    shutil.copy(newest(home, "vqvae") / "checkpoints" / "last.ckpt", home / "checkpoints" / "last.ckpt")
    shutil.copy(newest(home, "vqvae") / "checkpoints" / "last.ckpt", home / "project" / "checkpoints" / "last.ckpt")
    return ["task=vqvae", *FEW, *SMALL, "resume=checkpoints/last.ckpt"], ["resume=checkpoints/last.ckpt"]


CASES: dict[str, Callable[[Path], tuple[list[str], list[str]]]] = {
    "pickle": hostile_pickle,
    "pickle under an adapter": hostile_base,
    "program": hostile_program,
    "checkpoint in the working folder": folder_of_somebody_else,
    "project folder": lambda home: (["task=vqvae", *FEW, *SMALL, "resume=project"], ["project", "is not the folder"]),
    "working folder as run folder": lambda home: (
        ["task=vqvae", *FEW, *SMALL, "run_dir=."],
        ["run_dir=. holds files that no run has made"],
    ),
    "begun in a folder of somebody else": lambda home: (
        ["task=vqvae", *FEW, *SMALL, "run_dir=project", "resume=auto"],
        ["project", "is not the folder of a run"],
    ),
}


def lock_as_a_link(home: Path) -> tuple[list[str], list[str]]:
    run = copied(home, "vqvae", "downloaded_lock")
    (run / ".lock").symlink_to(home / "diary.txt")
    return ["task=vqvae", *FEW, *SMALL, f"resume={run}"], [str(run / ".lock"), "is a link"]


def checkpoints_as_a_link(home: Path) -> tuple[list[str], list[str]]:
    run = copied(home, "vqvae", "downloaded_link")
    shutil.copy(run / "checkpoints" / "last.ckpt", home / "victim" / "last.ckpt")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(home / "victim")
    return ["task=vqvae", *FEW, *SMALL, f"resume={run}"], [str(run / "checkpoints"), "is a link"]


def other_text_tokenizer(home: Path) -> tuple[list[str], list[str]]:
    """A run that is refused must not have replaced the text.model of the finished run in its folder."""
    run = copied(home, "tokenize", "finished_tokens")
    learned_text(["别的话", "另一句话"] * 20, vocab_size=290).save(home / "other.model")
    same = "data.object_probabilities=[0.2,0.4,0.4]"
    return ["task=tokenize", *SMALL, same, f"resume={run}", "text.model=other.model"], [
        "text_vocab_size 340, this run has 279",
        str(run),
    ]


def other_images(home: Path) -> tuple[list[str], list[str]]:
    """A run that was begun with other settings of the toy world, so that its images differ."""
    run = copied(home, "tokenize", "other_images")
    return ["task=tokenize", *SMALL, "data.seed=9", f"resume={run}"], ["data (train split)", "verify=false"]


def other_weights(home: Path) -> tuple[list[str], list[str]]:
    """A run whose base model has been replaced by another one."""
    run = copied(home, "generate", "generated")
    model = shutil.copytree(newest(home, "pretrain"), home / "mine")
    weights = load_sequence_model(model).model.state_dict()
    weights["final_norm.bias"] = weights["final_norm.bias"] + 0.01
    save_file({name: tensor.clone() for name, tensor in weights.items()}, model / "model" / "weights.safetensors")
    forge_manifest(model / "model")
    config = OmegaConf.load(run / "config.yaml")
    same = [f"sampler.{name}={value}" for name, value in config.sampler.items()]
    same += [f"{name}={config[name]}" for name in ("seed", "num_images_per_prompt", "num_prompts")]
    command = ["task=generate", f"init_from={model}", f"resume={run}", "threads=1", *same]
    return command, ["init_from has changed", "verify=false"]


CASES |= {
    "lock as a link": lock_as_a_link,
    "checkpoints as a link": checkpoints_as_a_link,
    "other text tokenizer": other_text_tokenizer,
    "other images": other_images,
    "other weights": other_weights,
}


def test_attacks_are_refused_and_bystanders_stay(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    """The run ends with exit code 2 and one line; the home folder is unchanged, and there is no new run folder."""
    cases = {name: make(home) for name, make in CASES.items()}
    before = everything(home)
    ended = cli.run_many([(args, home) for args, _ in cases.values()], tmp_path)
    wrong = [
        f"{name}: {result.code}, wanted {words}: {result.stderr[-1500:]}"
        for (name, (_, words)), result in zip(cases.items(), ended, strict=True)
        if result.code != 2
        or not result.stderr.startswith("cogview_pl: ")
        or result.stderr.count("\n") != 1
        or not all(word in result.stderr for word in words)
    ]
    assert not wrong, "\n".join(wrong)
    after = everything(home)
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    assert [path for path in before if before[path] != after[path]] == []


# --- what goes on, and does no harm ---


@pytest.fixture(scope="module")
def stopped(cli: CommandLine, home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were changed while they were stopped, in a folder next to the home folder; see below."""
    root = tmp_path_factory.mktemp("stopped")
    data = root / "data"
    data.mkdir()
    for number in range(8):
        Image.effect_noise((64, 64), 10 * number + 1).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"第{number}张图")
    commands = command_lines(home, root)
    ended = cli.run_many([([*command, f"run_dir={root / name}"], home) for name, command in commands.items()], root)
    assert [result.code for result in ended] == [0] * len(commands), ended
    runs = {name: root / name for name in commands} | {"whole": root / "whole"}
    believe_nothing(runs["checkpoint"], [home / "victim", home / "diary.txt"])
    shutil.copytree(runs["finetune"], runs["whole"])
    for name in ("model", "adapter", "checkpoints", "tensorboard"):  # the state after a kill right after the last row
        shutil.rmtree(runs["finetune"] / name, ignore_errors=True)
    (runs["finetune"] / "metrics.json").unlink()
    Image.effect_noise((64, 64), 99).save(data / "3.png")
    return runs


def command_lines(home: Path, root: Path) -> dict[str, list[str]]:
    """Name of a run → its command line."""
    keep = ("callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.save_top_k=2")
    return {
        "checkpoint": ["task=vqvae", *FEW, *SMALL, *keep],
        "finetune": [
            "task=style", "data.styles=[oil,ink]", *FEW, "~callbacks.samples", *SMALL, "lora.rank=4",
            "model.dropout=0.1", "sequences.token_noise=0.1", f"init_from={newest(home, 'pretrain')}",
            "sequences.replay_share=0",
        ],
        "tokens": [
            "task=tokenize", "data=folder", f"data.root={root / 'data'}", "data.batch_size=2", "text.vocab_size=290",
            "threads=1", f"image_tokenizer.path={newest(home, 'vqvae')}",
        ],
    }  # fmt: skip


def believe_nothing(run: Path, victims: list[Path]) -> None:
    """Name the victims in a checkpoint as earlier checkpoints; these are deleted when the next one is saved."""
    file = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    (state,) = [state for name, state in checkpoint["callbacks"].items() if name.startswith("Checkpoints")]
    paths = [*map(str, victims), f"{run}/checkpoints/../../../victim", "../victim", f"{run}/checkpoints/.."]
    state |= {"best_k_models": {path: torch.tensor(0.0) for path in paths}, "kth_best_model_path": paths[0]}
    state |= {"last_model_path": paths[1], "best_model_path": paths[0]}
    torch.save(checkpoint, file)


@pytest.fixture(scope="module")
def gone_on(cli: CommandLine, home: Path, stopped: dict[str, Path]) -> dict[str, Ended]:
    """Results of the resumed runs; the home folder must be unchanged."""
    root = stopped["whole"].parent
    before = everything(home)
    cases = {name: [*command, f"resume={stopped[name]}"] for name, command in command_lines(home, root).items()}
    cases["checkpoint"].append("trainer.max_steps=9")
    cases["tokens, believed"] = [*cases["tokens"], "verify=false"]
    ended = cli.run_many([(args, home) for args in cases.values()], root)
    assert everything(home) == before
    return dict(zip(cases, ended, strict=True))


def test_a_checkpoint_deletes_nothing_outside_its_run(gone_on: dict[str, Ended], stopped: dict[str, Path]) -> None:
    """Only checkpoints in the run's own folder are deleted."""
    assert gone_on["checkpoint"].code == 0, gone_on["checkpoint"].stderr
    names = {path.name for path in (stopped["checkpoint"] / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "step_5.ckpt", "step_6.ckpt", "step_8.ckpt", "step_9.ckpt"}  # 5, 6: of before


def test_a_finetune_that_tokenises_goes_on_exactly_before_its_first_checkpoint(
    gone_on: dict[str, Ended], stopped: dict[str, Path]
) -> None:
    """Random numbers of tokenising do not change dropout, noise, or the initial weights of an adapter."""
    assert gone_on["finetune"].code == 0, gone_on["finetune"].stderr
    require_same(stopped["whole"], stopped["finetune"])


def test_data_that_changed_are_found_and_taken_on_request(gone_on: dict[str, Ended]) -> None:
    """Another image under an old name is refused, so that a token store never mixes both."""
    refused = gone_on["tokens"]
    assert refused.code == 2 and "data (train split) has changed" in refused.stderr
    assert gone_on["tokens, believed"].code == 0, gone_on["tokens, believed"].stderr


# --- what machines and shells do ---


def test_odd_surroundings(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    """Runs work with variables of an earlier launch, a closed pipe, a locale without Chinese, and few open files."""

    def shell(line: str) -> subprocess.CompletedProcess[str]:
        line = line.replace("RUN", " ".join((*COMMAND, "task=vqvae", "trainer.max_steps=1", *SMALL, "threads=1")))
        options = {"cwd": home, "env": cli.environment, "capture_output": True, "text": True, "timeout": 300}
        return subprocess.run(["bash", "-c", line], check=False, **options)  # type: ignore[call-overload, no-any-return]

    ascii_only = "LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0"
    ended = shell(f"set -o pipefail; {ascii_only} LOCAL_RANK=1 SLURM_PROCID=3 RUN run_dir={tmp_path}/画 | head -1")
    assert ended.returncode == 0, ended.stderr
    assert "LOCAL_RANK=1 is ignored" in ended.stderr and "Traceback" not in ended.stderr
    assert (tmp_path / "画" / "model" / "weights.safetensors").is_file()
    ended = shell(f"ulimit -n 16; RUN data.num_workers=2 run_dir={tmp_path}/files")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert "ulimit -n" in ended.stderr.splitlines()[-1]
