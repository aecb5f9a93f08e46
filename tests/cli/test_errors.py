"""Mistakes of a user end with exit code 2 and one line that names the key or file, and leave no run folder."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from ..checkpoints.saved import forge_manifest

FIRST_TASK = ("task=vqvae", "trainer.max_steps=1")
SLURM = "cogview_pl[slurm]" if importlib.util.find_spec("submitit") is None else "srun"
"""What is missing for a sweep by SLURM: the launcher, or the scheduler."""

CASES: dict[str, tuple[list[str], list[str]]] = {
    # composing
    "unknown_key": (["task=vqvae", "sed=1"], ["sed", "seed"]),
    "unknown_key_in_group": (["task=pretrain", "model.layer=3"], ["model.layer", "model.num_layers"]),
    "added_key": (["task=pretrain", "+model.layer=3"], ["model.layer", "model.num_layers"]),
    "wrong_type_model": (["task=pretrain", "model.num_layers=many"], ["model.num_layers", "many"]),
    "wrong_type_data": (["task=vqvae", "data.batch_size=x"], ["data.batch_size", "x"]),
    "unknown_task": (["task=foo"], ["foo", "vqvae", "tokenize", "pretrain", "generate"]),
    "unknown_model": (["task=vqvae", "model=huge"], ["model=huge", "tiny", "base"]),
    "unknown_quantizer": (
        ["task=vqvae", "image_tokenizer/quantizer=foo"],
        ["image_tokenizer/quantizer=foo", "ema", "gumbel"],
    ),
    "quantizer_as_value": (["task=vqvae", "image_tokenizer.quantizer=foo"], ["image_tokenizer.quantizer", "foo"]),
    "unknown_experiment": (["experiment=foo"], ["experiment=foo", "quickstart"]),
    "no_task": ([], ["task"]),
    "variable_of_the_shell": (["experiment=portraits"], ["environment variable PORTRAITS is not set; put PORTRAITS="]),
    "no_stages": (["task=chain"], ["stages is empty", "experiment="]),
    "number_for_a_choice": (["task=vqvae", "precision=16"], ["precision=fp16", "name of a choice"]),
    "task_without_key": (["vqvae"], ["vqvae is not of the form KEY=VALUE", "task=vqvae"]),
    "unreadable_override": (["task=vqvae", "seed=["], ["seed"]),
    "unknown_norm": (["task=pretrain", "model.norm=rms"], ["model.norm", "rms", "sandwich"]),
    "unknown_weights": (["task=generate", "quantization=int3"], ["quantization", "int3", "int8", "int4"]),
    "unknown_checkpointing": (
        ["task=pretrain", "activation_checkpointing=some"],
        ["activation_checkpointing", "some", "selective"],
    ),
    # sizes
    "no_steps": (["task=vqvae", "trainer.max_steps=0"], ["trainer.max_steps", "0"]),
    "negative_steps": (["task=pretrain", "trainer.max_steps=-1"], ["trainer.max_steps", "-1"]),
    "no_validation_interval": ([*FIRST_TASK, "trainer.val_check_interval=0"], ["trainer.val_check_interval"]),
    "no_accumulation": ([*FIRST_TASK, "trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches"]),
    "steps_no_number": (["task=vqvae", "trainer.max_steps=many"], ["trainer.max_steps", "many"]),
    "no_batch": ([*FIRST_TASK, "data.batch_size=0"], ["data.batch_size", "0"]),
    "negative_workers": ([*FIRST_TASK, "data.num_workers=-1"], ["data.num_workers", "-1"]),
    "no_peak": ([*FIRST_TASK, "callbacks.throughput.peak_tflops=0"], ["callbacks.throughput.peak_tflops", "0"]),
    "no_threads": ([*FIRST_TASK, "threads=0"], ["threads", "0"]),
    "empty_toy": ([*FIRST_TASK, "data.train_size=0"], ["data.train_size", "0"]),
    "no_images": (["task=generate", "num_images_per_prompt=0"], ["num_images_per_prompt", "0"]),
    "no_prompts_asked": (["task=generate", "num_prompts=0"], ["num_prompts", "0"]),
    "no_sampler_batch": (["task=generate", "sampler.batch_size=0"], ["sampler.batch_size", "0"]),
    "downsampling": (
        [*FIRST_TASK, "image_tokenizer.downsampling=5", "image_tokenizer.image_size=65"],
        ["image_tokenizer.downsampling", "5"],
    ),
    "size_of_image": (
        [*FIRST_TASK, "image_tokenizer.image_size=60"],
        ["image_tokenizer.image_size=60", "not a multiple", "image_tokenizer.downsampling=8"],
    ),
    "no_downsampling": ([*FIRST_TASK, "image_tokenizer.downsampling=0"], ["image_tokenizer.downsampling", "0"]),
    "no_codes": ([*FIRST_TASK, "image_tokenizer.codebook_size=0"], ["image_tokenizer.codebook_size", "0"]),
    "no_width": ([*FIRST_TASK, "image_tokenizer.hidden_size=0"], ["image_tokenizer.hidden_size", "0"]),
    "heads": (["task=pretrain", "model.num_heads=5"], ["model.hidden_size", "96", "model.num_heads", "5"]),
    "no_layers": (["task=pretrain", "model.num_layers=0"], ["model.num_layers", "0"]),
    "dropout": (["task=pretrain", "model.dropout=1.5"], ["model.dropout", "1.5"]),
    "positions": (["task=pretrain", "model.num_positions=64"], ["model.num_positions", "64"]),
    "plan_with_wrong_sizes": (["task=pretrain", "plan=true", "model.num_heads=5"], ["model.num_heads", "5"]),
    # data
    "language": ([*FIRST_TASK, "data.language=fr"], ["data.language", "fr", "zh"]),
    "styles": ([*FIRST_TASK, "data.styles=[x]"], ["data.styles", "x", "flat"]),
    "no_styles": ([*FIRST_TASK, "data.styles=[]"], ["data.styles"]),
    "object_probabilities": ([*FIRST_TASK, "data.object_probabilities=[0,0,0]"], ["data.object_probabilities"]),
    "folder_missing": ([*FIRST_TASK, "data=folder", "data.root=/nowhere"], ["data.root", "/nowhere"]),
    "folder_not_given": ([*FIRST_TASK, "data=folder"], ["data.root", "data.styles"]),
    "folder_given_twice": (
        [*FIRST_TASK, "data=folder", "data.root={good}", "data.styles={oil: {good}}"],
        ["data.root={good}", "data.styles"],
    ),
    "style_folder_missing": (
        [*FIRST_TASK, "data=folder", "data.styles={油画: {good}, 素描: /nowhere}"],
        ["data.styles.素描=/nowhere"],
    ),
    "style_pattern": ([*FIRST_TASK, "data.style_patterns=[{style}风格]"], ["data.style_patterns", "'{style}风格'"]),
    "patterns_without_styles": (
        [*FIRST_TASK, "data=folder", "data.root={good}", "data.style_patterns=[{style}风格的{text}]"],
        ["data.style_patterns", "data.styles", "data.style_field"],
    ),
    "style_not_in_data": (
        [*FIRST_TASK, "data=webdataset", "data.urls={shard}", "data.style_field=style", "data.styles=[油画,水墨]"],
        ["data.styles", "水墨", "data.style_field=style", "油画, 素描"],
    ),
    "smaller_images": (
        [*FIRST_TASK, "data=folder", "data.root={good}", "data.min_size=65"],
        ["64x64", "data.min_size=65"],
    ),
    "min_size": ([*FIRST_TASK, "data=folder", "data.root={good}", "data.min_size=-1"], ["data.min_size", "-1"]),
    "folder_without_captions": (["task=tokenize", "data=folder", "data.root={plain}"], ["data.root={plain}", ".txt"]),
    "folder_unreadable": ([*FIRST_TASK, "data=folder", "data.root={corrupt}"], ["data", "00.png"]),
    "val_fraction": (
        [*FIRST_TASK, "data=folder", "data.root={good}", "data.val_fraction=2"],
        ["data.val_fraction", "2"],
    ),
    "urls_not_given": ([*FIRST_TASK, "data=webdataset"], ["data.urls"]),
    "urls_remote": ([*FIRST_TASK, "data=webdataset", "data.urls=https://a/b.tar"], ["data.urls", "https://a/b.tar"]),
    "urls_missing": ([*FIRST_TASK, "data=webdataset", "data.urls=/nowhere/{0..3}.tar"], ["data.urls", "/nowhere"]),
    # optimizer, precision, devices
    "optimizer_argument": ([*FIRST_TASK, "+optimizer.optimizer.lrr=1"], ["optimizer.optimizer", "lrr"]),
    "optimizer_class": ([*FIRST_TASK, "optimizer.optimizer._target_=torch.optim.Adamm"], ["optimizer", "Adamm"]),
    "trainer_argument": ([*FIRST_TASK, "+trainer.max_step=1"], ["trainer.max_step:", "trainer.max_steps"]),
    "fp16": ([*FIRST_TASK, "precision=fp16"], ["precision=fp16", "GPU"]),
    "unknown_strategy": (["task=pretrain", "strategy=fsdp3"], ["strategy=fsdp3", "ddp", "fsdp", "tp"]),
    "tokenizer_fsdp": ([*FIRST_TASK, "strategy=fsdp"], ["strategy=fsdp", "image tokenizer", "strategy=ddp"]),
    "tokenizer_deepspeed": ([*FIRST_TASK, "strategy=deepspeed_2"], ["strategy=deepspeed_2", "image tokenizer"]),
    "muon_fsdp": (["task=pretrain", "strategy=fsdp", "optimizer=muon"], ["strategy=fsdp", "optimizer=muon"]),
    "tp_compiled": (["task=pretrain", "strategy=tp", "compile=true"], ["strategy=tp", "compile=true"]),
    "tp_evaluate": (["task=evaluate", "strategy=tp", "evaluate.metrics=[toy]"], ["strategy=tp", "task=evaluate"]),
    "tp_quantized": (["task=generate", "strategy=tp", "quantization=int8"], ["strategy=tp", "quantization"]),
    "deepspeed": (["task=pretrain", "strategy=deepspeed_3"], ["strategy=deepspeed_3", "strategy=fsdp"]),
    "slurm_launcher": (["-m", *FIRST_TASK, "hydra/launcher=submitit_slurm"], ["hydra/launcher=submitit", SLURM]),
    "no_gpu": ([*FIRST_TASK, "trainer.accelerator=gpu"], ["trainer", "gpu"]),
    "font": (["task=generate", "init_from={pretrain}", "font=/nowhere.ttf", "num_prompts=1"], ["font=/nowhere.ttf"]),
    # results of earlier tasks
    "tokenize_first": (["task=tokenize", "outputs={empty}"], ["image_tokenizer.path", "task=vqvae"]),
    "pretrain_first": (
        ["task=pretrain", "outputs={empty}"],
        ["data.token_store", "python -m cogview_pl.run task=tokenize"],
    ),
    "generate_first": (["task=generate", "outputs={empty}"], ["init_from", "python -m cogview_pl.run task=pretrain"]),
    "init_from_missing": (["task=generate", "init_from=/nowhere"], ["init_from", "/nowhere"]),
    "init_from_other_stage": (
        ["task=generate", "init_from={vqvae}"],
        ["init_from", "image_tokenizer", "task=pretrain"],
    ),
    "init_from_other_stage_1": ([*FIRST_TASK, "init_from={pretrain}"], ["init_from", "sequence_model", "task=vqvae"]),
    "init_from_other_codes": (
        ["task=pretrain", "init_from={other_codes}", "data.token_store={tokenize}"],
        ["init_from={other_codes}", "another image tokenizer than the token store"],
    ),
    "init_from_other_size": (
        ["task=pretrain", "init_from={pretrain}", "model.num_layers=1"],
        ["init_from", "num_layers"],
    ),
    "init_from_no_model": (["task=generate", "init_from={tokenize}"], ["init_from={tokenize}", "model/"]),
    "tokenizer_other_stage": (
        ["task=tokenize", "image_tokenizer.path={pretrain}"],
        ["image_tokenizer.path", "sequence_model", "task=vqvae"],
    ),
    "tokenizer_other_size": (
        ["task=tokenize", "image_tokenizer.image_size=32"],
        ["data.image_size=32", "64"],
    ),
    "store_of_other_tokenizer": (
        ["task=pretrain", "data.token_store={tokenize}", "image_tokenizer.path={other_vqvae}"],
        ["{tokenize}/token_store", "image_tokenizer", "task=tokenize"],
    ),
    "store_of_other_grid": (
        ["task=pretrain", "image_tokenizer.image_size=32"],
        ["template.layout", "4x4", "8x8"],
    ),
    "store_no_run": (
        ["task=pretrain", "data.token_store={plain}"],
        ["{plain}/token_store", "header.json", "task=tokenize"],
    ),
    "store_truncated": (
        ["task=pretrain", "data.token_store={truncated}"],
        ["{truncated}/token_store/train.bin", "truncated"],
    ),
    "store_unfinished": (
        ["task=pretrain", "data.token_store={unfinished}"],
        ["{unfinished}/token_store", "resume=true"],
    ),
    "store_damaged": (["task=pretrain", "data.token_store={damaged}"], ["{damaged}/token_store/header.json", "JSON"]),
    "weights_damaged": (["task=generate", "init_from={damaged_model}"], ["weights.safetensors", "damaged"]),
    "model_config_damaged": (["task=generate", "init_from={damaged_config}"], ["{damaged_config}/model/config.yaml"]),
    "text_model_missing": (["task=tokenize", "text.model=/nowhere.model"], ["text.model=/nowhere.model"]),
    "text_model_damaged": (["task=tokenize", "text.model={plain}/00.png"], ["text.model", "SentencePiece"]),
    "too_few_pieces": (["task=tokenize", "text.vocab_size=100"], ["text.vocab_size=100"]),
    # prompts and sampling
    "prompt_too_long": (["task=generate", "prompts=[" + "红色的圆形" * 20 + "]"], ["prompts", "48"]),
    "prompts_file_missing": (["task=generate", "prompts=nowhere.txt"], ["prompts=nowhere.txt"]),
    "prompts_no_text": (["task=generate", "prompts={latin}"], ["prompts=", "UTF-8"]),
    "prompts_in_no_file": (["task=generate", "prompts=data/prompts"], ["prompts=data/prompts", "does not exist"]),
    "prompts_empty": (["task=generate", "prompts=[]"], ["prompts"]),
    "prompts_blank": (["task=generate", "prompts=[' ']"], ["prompts"]),
    "temperature": (["task=generate", "sampler.temperature=-1"], ["sampler.temperature", "-1"]),
    "top_p": (["task=generate", "sampler.top_p=0"], ["sampler.top_p", "0"]),
    "top_k": (["task=generate", "sampler.top_k=-5"], ["sampler.top_k", "-5"]),
    "guidance": (["task=generate", "sampler.guidance=-1"], ["sampler.guidance", "-1"]),
    # resume
    "nothing_to_resume": (["task=vqvae", "resume=true", "outputs={empty}"], ["resume=true", "last.ckpt"]),
    "resume_path_missing": (["task=pretrain", "resume=/nowhere"], ["resume=/nowhere"]),
    "resume_other_stage": (["task=pretrain", "resume={vqvae}"], ["resume", "task=vqvae", "task=pretrain"]),
    "resume_other_stage_1": (["task=vqvae", "resume={pretrain}"], ["resume", "task=pretrain", "task=vqvae"]),
    "resume_other_size": (["task=pretrain", "resume={pretrain}", "model.num_layers=1"], ["resume", "num_layers"]),
    "resume_damaged": (
        ["task=vqvae", "resume={damaged_checkpoint}", "trainer.max_steps=99"],
        ["resume", "last.ckpt", "damaged"],
    ),
    "resume_generate": (["task=generate", "resume=true"], ["resume", "generate"]),
    "resume_auto": (["task=vqvae", "resume=auto"], ["resume=auto", "run_dir"]),
    "run_dir_of_another_run": ([*FIRST_TASK, "run_dir={pretrain}"], ["run_dir={pretrain}", "last.ckpt", "resume="]),
    "resume_flipped": (
        ["task=vqvae", "resume={flipped_checkpoint}", "trainer.max_steps=99"],
        ["last.ckpt", "damaged", "checksum"],
    ),
    "monitor": (
        [*FIRST_TASK, "callbacks.checkpoint.monitor=val/loss"],
        ["callbacks.checkpoint.monitor=val/loss", "no such metric", "val/loss_reconstruction"],
    ),
    "monitor_of_stage_2": (
        ["task=pretrain", "callbacks.checkpoint.monitor=val/los"],
        ["callbacks.checkpoint.monitor=val/los", "val/loss, val/loss_text, val/loss_image"],
    ),
    "monitor_mode": ([*FIRST_TASK, "callbacks.checkpoint.mode=least"], ["callbacks.checkpoint.mode=least", "min"]),
    "patience": ([*FIRST_TASK, "callbacks.nan_guard.patience=0"], ["callbacks.nan_guard.patience", "0"]),
    "endless_steps": ([*FIRST_TASK, "trainer.max_steps=inf"], ["trainer.max_steps", "inf"]),
    "run_dir_is_file": ([*FIRST_TASK, "run_dir={plain}/00.png"], ["run_dir={plain}/00.png"]),
}


@pytest.fixture(scope="module")
def places(chain, tmp_path_factory) -> dict[str, Path]:
    """Folders with one fault each, and the run folders of the chain."""
    root = tmp_path_factory.mktemp("faults")
    found = {task: chain.run_folder(task) for task in ("vqvae", "tokenize", "pretrain")}
    for name in ("empty", "plain", "corrupt", "good"):
        found[name] = root / name
        found[name].mkdir()
    for name in ("plain", "good"):
        for number in range(6):
            Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(found[name] / f"{number:02d}.png")
    (found["corrupt"] / "00.png").write_bytes(b"no image")
    for name, count in (("corrupt", 1), ("good", 6)):
        for number in range(count):
            (found[name] / f"{number:02d}.txt").write_text("红色")
    found["shard"] = root / "styles.tar"
    with tarfile.open(found["shard"], "w") as tar:
        for number, style in enumerate(("油画", "素描")):
            fields = json.dumps({"caption": "红色", "style": style}).encode()
            for name, content in (("png", (found["good"] / "00.png").read_bytes()), ("json", fields)):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    found["latin"] = root / "latin.txt"
    found["latin"].write_bytes(b"caf\xe9")

    def copy(name: str, task: str) -> Path:
        found[name] = root / name
        shutil.copytree(found[task], found[name])
        return found[name]

    file = copy("other_vqvae", "vqvae") / "model" / "weights.safetensors"
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    forge_manifest(file.parent)
    file = copy("other_codes", "pretrain") / "model" / "image_tokenizer" / "weights.safetensors"
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    forge_manifest(file.parent)
    forge_manifest(file.parents[1])
    file = copy("truncated", "tokenize") / "token_store" / "train.bin"
    file.write_bytes(file.read_bytes()[:-1])
    file = copy("unfinished", "tokenize") / "token_store" / "header.json"
    values = json.loads(file.read_text()) | {"complete": False}
    del values["checksums"], values["crc32"]  # a header of an earlier version
    file.write_text(json.dumps(values))
    file = copy("damaged", "tokenize") / "token_store" / "header.json"
    file.write_bytes(file.read_bytes()[:50])
    file = copy("damaged_model", "pretrain") / "model" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    (copy("damaged_config", "pretrain") / "model" / "config.yaml").write_text("a: [")
    file = copy("flipped_checkpoint", "vqvae") / "checkpoints" / "last.ckpt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    file = copy("damaged_checkpoint", "vqvae") / "checkpoints" / "last.ckpt"
    file.write_bytes(file.read_bytes()[:1000])
    return found


@pytest.fixture(scope="module")
def outcomes(cli, chain, places, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit code and standard error of every case, run in one process."""
    names = list(CASES)
    commands = [[_fill(word, places) for word in CASES[name][0]] for name in names]
    ended = cli.run_many([(command, chain.home) for command in commands], tmp_path_factory.mktemp("cases"))
    return {name: (result.code, result.stderr) for name, result in zip(names, ended, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_code_2(name: str, outcomes, places) -> None:
    code, stderr = outcomes[name]
    assert code == 2, stderr[-3000:]
    assert stderr.startswith("cogview_pl: ")
    assert stderr.count("\n") == 1
    for word in CASES[name][1]:
        assert _fill(word, places) in stderr


def _fill(word: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        word = word.replace("{" + name + "}", str(path))
    return word


def test_mistakes_leave_no_run_folder_and_change_none(outcomes, chain, places) -> None:
    left = {path for path in chain.home.glob("outputs/*/*") if not path.is_symlink()}
    assert left == chain.configurations.keys()
    for run, text in chain.configurations.items():
        assert (run / "config.yaml").read_text(encoding="utf-8") == text, run
    assert list(places["empty"].glob("*/*")) == []


@pytest.mark.parametrize(
    "args",
    [
        ["task=foo"],
        ["task=pretrain", "model.layer=3"],
        ["task=vqvae", "data=folder", "data.root=/nowhere"],
    ],
    ids=" ".join,
)
def test_in_a_process_of_its_own(args: list[str], cli, tmp_path: Path) -> None:
    ended = cli.run(args, tmp_path)
    assert ended.code == 2
    assert ended.stderr.startswith("cogview_pl: ")
    assert ended.stderr.count("\n") == 1
    assert "Traceback" not in ended.stdout
    assert list(tmp_path.glob("outputs/*/*")) == []
