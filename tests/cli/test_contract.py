"""Guarantees of a run: its folder, its metrics, and the same result from the same seed and from Python."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cogview_pl import CogView
from cogview_pl.generation.config import Sampling

PROMPTS = ("左上角有一个大的红色圆形", "右边有一个小的蓝色心形")
GENERATE = (
    "task=generate",
    f"prompts=[{','.join(PROMPTS)}]",
    "num_images_per_prompt=2",
    "seed=7",
    "sampler.top_p=0.9",
    "threads=1",
)

LEFT_OUT = (
    "super_resolution",
    "style",
    "features",
    "magnified",
    "styled",
    "styles_evaluated",
    "found_captions",
    "every_style",
)

FILES = {
    "vqvae": {"checkpoints/last.ckpt", "model/config.yaml", "model/weights.safetensors", "reconstructions.png"},
    "tokenize": {"token_store/header.json", "token_store/train.bin", "token_store/val.bin", "text.model"},
    "pretrain": {
        "checkpoints/last.ckpt",
        "model/config.yaml",
        "model/weights.safetensors",
        "model/text.model",
        "model/image_tokenizer/weights.safetensors",
    },
    "generate": {"samples.jsonl", "samples/grid.png", "samples/0000/00.png", "samples/0003/00.png"},
    "quickstart": {"vqvae.png", "generate.png"},
}
METRICS = {
    "vqvae": {"eval/psnr", "codebook/usage", "codebook/perplexity", "val/loss_reconstruction", "train/loss"},
    "tokenize": {"tokenize/rows_train", "tokenize/rows_val", "tokenize/skipped", "perf/images_per_s"},
    "pretrain": {"val/loss", "val/loss_text", "val/loss_image", "perf/tokens_per_s", "perf/model_tflops"},
    "generate": {"toy/colour_accuracy", "toy/shape_accuracy", "toy/place_accuracy", "perf/tokens_per_s"},
    "quickstart": {"eval/psnr", "val/loss_image", "toy/colour_accuracy", "perf/vqvae_s", "perf/generate_s"},
}
TAGS = {
    "vqvae": {"train/loss", "train/psnr", "val/psnr", "watch-codebook/usage", "watch-lr-Muon/filters"},
    "pretrain": {
        "train/loss",
        "train/loss_text",
        "train/loss_image",
        "watch-train/gradient_norm",
        "val/loss",
        "val/loss_image",
    }
    | {"watch-activations/group0_max", "watch-perf/tokens_per_s"},
}
IMAGES = {"vqvae": "val/originals_over_reconstructions", "pretrain": "val/samples"}


def metrics(run: Path, keep_speed: bool = False) -> dict[str, float]:
    found = json.loads((run / "metrics.json").read_text())
    return {name: value for name, value in found.items() if keep_speed or not name.startswith("perf/")}


class TestRunFolder:
    @pytest.mark.parametrize("task", FILES)
    def test_holds_what_later_tasks_and_people_look_for(self, task: str, chain) -> None:
        latest = chain.home / "outputs" / task / "latest"
        assert latest.is_symlink()
        for file in FILES[task] | {"config.yaml", "metrics.json"}:
            assert (latest / file).is_file(), file

    @pytest.mark.parametrize("task", METRICS)
    def test_metrics_are_flat_numbers_with_the_promised_names(self, task: str, chain) -> None:
        found = metrics(chain.run_folder(task), keep_speed=True)
        assert METRICS[task] <= found.keys()
        numbers = {key: value for key, value in found.items() if not key.startswith("protocol/")}
        assert all(isinstance(value, (int, float)) for value in numbers.values())

    @pytest.mark.parametrize("task", ["vqvae", "tokenize", "pretrain", "generate"])
    def test_config_is_resolved_and_overrides_reach_every_stage(self, task: str, chain) -> None:
        text = (chain.run_folder(task) / "config.yaml").read_text()
        assert "${" not in text
        config = OmegaConf.create(text)
        assert (config.task, config.seed, config.data.batch_size, config.trainer.max_steps) == (task, 3, 8, 6)

    @pytest.mark.parametrize("task", ["vqvae", "pretrain"])
    def test_checkpoint_runs_no_code(self, task: str, chain) -> None:
        checkpoint = torch.load(chain.run_folder(task) / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 6

    @pytest.mark.parametrize("task", TAGS)
    def test_tensorboard_has_curves_and_images(self, task: str, chain) -> None:
        events = EventAccumulator(str(chain.run_folder(task) / "tensorboard"))
        events.Reload()
        assert TAGS[task] <= set(events.Tags()["scalars"])
        assert [image.step for image in events.Images(IMAGES[task])] == [3, 6]


def write_images(folder: Path, count: int, corrupt: int) -> None:
    """Images with captions; the first `corrupt` images cannot be read."""
    folder.mkdir()
    lines = [json.dumps({"file_name": f"{i:03d}.png", "text": f"图{i}"}, ensure_ascii=False) for i in range(count)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    for i in range(count):
        if i < corrupt:
            (folder / f"{i:03d}.png").write_bytes(b"no image")
        else:
            Image.new("RGB", (64, 64), (i * 4, 90, 30)).save(folder / f"{i:03d}.png")


def write_shard(file: Path, first: int, count: int) -> None:
    """A WebDataset shard."""
    image = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 0, 0)).save(image, "PNG")
    with tarfile.open(file, "w") as tar:
        for number in range(first, first + count):
            caption = json.dumps({"caption_zh": "红色的方块"}).encode()
            for suffix, data in (("png", image.getvalue()), ("json", caption)):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Working folder of the runs below."""
    home = tmp_path_factory.mktemp("contract")
    write_images(home / "one_corrupt", 12, 1)
    write_images(home / "half_corrupt", 64, 32)
    for shard in range(2):
        write_shard(home / f"{shard}.tar", 10 * shard, 10)
    return home


@pytest.fixture(scope="module")
def runs(cli, chain, tiny, home, tmp_path_factory) -> dict[str, object]:
    """All runs of this file that can share a process."""
    scratch = tmp_path_factory.mktemp("scratch")
    pretrain = ("task=pretrain", *tiny, f"data.token_store={chain.run_folder('tokenize')}")
    vqvae = ("task=vqvae", *tiny)
    model = f"init_from={chain.run_folder('pretrain')}"
    commands = {
        "generated": (*GENERATE, model, "run_dir=generated"),
        "generated_again": (*GENERATE, model, "run_dir=generated_again"),
        "pretrain": (*pretrain, "seed=3", "run_dir=pretrain"),
        "dropout": (*pretrain, "seed=3", "model.dropout=0.5", "run_dir=dropout"),
        "plan": ("task=pretrain", "plan=true", "outputs=planned"),
        "sweep": ("-m", *vqvae, "seed=0,1", "trainer.max_steps=3", "outputs=swept"),
        "one_corrupt": (*vqvae, "data=folder", "data.root=one_corrupt", "run_dir=skipping"),
        "half_corrupt": (*vqvae, "data=folder", "data.root=half_corrupt", "trainer.max_steps=50", "run_dir=stopped"),
        "shards": (
            *vqvae,
            "data=webdataset",
            "data.urls={0..1}.tar",
            "data.caption_field=caption_zh",
            "run_dir=shards",
        ),
    }
    commands |= {
        name: tuple(word for word in words if not word.startswith(("data.train_size", "data.val_size")))
        for name, words in commands.items()
        if any(word in ("data=folder", "data=webdataset") for word in words)
    }
    ended = cli.run_many([(words, home) for words in commands.values()], scratch)
    return dict(zip(commands, ended, strict=True))


def require_done(runs, *names: str) -> None:
    for name in names:
        assert runs[name].code == 0, runs[name].stderr[-3000:]


class TestGenerate:
    def test_samples_are_listed_with_file_seed_and_size(self, runs, home) -> None:
        require_done(runs, "generated")
        records = [json.loads(line) for line in (home / "generated" / "samples.jsonl").read_text().splitlines()]
        assert [record["prompt"] for record in records] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
        assert [record["seed"] for record in records] == [7, 8, 7, 8]
        for record in records:
            with Image.open(home / "generated" / record["file"]) as image:
                assert image.size == (record["width"], record["height"]) == (64, 64)

    def test_same_seed_same_bytes(self, runs, home) -> None:
        require_done(runs, "generated", "generated_again")
        files = sorted(file.relative_to(home / "generated") for file in (home / "generated" / "samples").rglob("*.png"))
        assert len(files) == 5
        for file in files:
            assert (home / "generated" / file).read_bytes() == (home / "generated_again" / file).read_bytes()
        assert metrics(home / "generated") == metrics(home / "generated_again")

    def test_python_generates_the_same_images(self, runs, home, chain) -> None:
        require_done(runs, "generated")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            model = CogView.load(chain.run_folder("pretrain"), device="cpu")
            sampling = Sampling(temperature=1.0, top_k=200, top_p=0.9)
            images = model.generate(PROMPTS[0], num_images_per_prompt=2, seed=7, sampling=sampling)
        finally:
            torch.set_num_threads(threads)
        for number, image in enumerate(images):
            with Image.open(home / "generated" / "samples" / "0000" / f"{number:02d}.png") as saved:
                assert np.array_equal(np.asarray(saved), np.asarray(image))

    def test_prompts_from_standard_input(self, cli, chain, tmp_path) -> None:
        args = ["task=generate", "prompts=-", f"init_from={chain.run_folder('pretrain')}", "run_dir=run"]
        cli.succeed(args, tmp_path, stdin="红色的圆形\n\n蓝色的心形\n")
        records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
        assert [record["prompt"] for record in records] == ["红色的圆形", "蓝色的心形"]

    def test_quantized_weights_paint(self, cli, chain, tmp_path) -> None:
        pytest.importorskip("torchao")
        models = [f"init_from={chain.run_folder('pretrain')}", f"rerank_with={chain.run_folder('caption')}"]
        ended = cli.succeed([*GENERATE, *models, "quantization=int8", "run_dir=run"], tmp_path)
        assert "KernelPreference" not in ended.stdout + ended.stderr
        records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
        assert len(records) == 4
        assert all((tmp_path / "run" / record["file"]).is_file() and record["caption_loss"] > 0 for record in records)


class TestTraining:
    def test_same_seed_same_numbers(self, cli, chain, tmp_path) -> None:
        """Half of the chain again in another folder and process, where sets have another order."""
        process = cli.start([*chain.command, *(f"~stages.{stage}" for stage in LEFT_OUT)], tmp_path)
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr[-4000:]
        again = tmp_path / "outputs"
        for task in ("vqvae", "tokenize", "pretrain", "caption", "generate"):
            assert metrics(again / task / "latest") == metrics(chain.run_folder(task))
        for task in ("vqvae", "pretrain", "caption"):
            weights = Path(task) / "latest" / "model" / "weights.safetensors"
            assert (again / weights).read_bytes() == (chain.home / "outputs" / weights).read_bytes()

    def test_dropout_acts_from_the_first_step(self, runs, home) -> None:
        require_done(runs, "pretrain", "dropout")
        first = []
        for name in ("pretrain", "dropout"):
            events = EventAccumulator(str(home / name / "tensorboard"))
            events.Reload()
            first.append(events.Scalars("train/loss")[0].value)
        assert first[0] != first[1]

    def test_one_unreadable_image_is_listed_and_passed_over(self, runs, home) -> None:
        require_done(runs, "one_corrupt")
        listed = [json.loads(line) for line in (home / "skipping" / "skipped.jsonl").read_text().splitlines()]
        assert [record["key"] for record in listed] == ["000.png"]
        assert metrics(home / "skipping")["data/skipped"] == 1

    def test_too_many_unreadable_images_stop_the_run(self, runs) -> None:
        ended = runs["half_corrupt"]
        assert ended.code == 2, ended.stderr[-3000:]
        assert "data.max_skipped_share" in ended.stderr
        assert "skipped.jsonl" in ended.stderr

    def test_shard_pattern_needs_no_quotes_of_its_own(self, runs, home) -> None:
        require_done(runs, "shards")
        assert (home / "shards" / "model" / "weights.safetensors").exists()


class TestPlanAndSweep:
    def test_plan_prints_sizes_and_writes_nothing(self, runs, home) -> None:
        require_done(runs, "plan")
        assert "sequence_model/parameters" in runs["plan"].stdout
        assert not (home / "planned").exists()

    def test_sweep_ends_with_a_table_of_its_jobs(self, runs, home) -> None:
        require_done(runs, "sweep")
        *table, file = runs["sweep"].stdout.splitlines()[-4:]
        assert table[0].split()[0] == "seed" and "eval/psnr" in table[0]
        assert [row.split()[0] for row in table[1:]] == ["0", "1"]
        (sweep,) = (path for path in (home / "swept" / "vqvae").iterdir() if not path.is_symlink())
        assert sweep.name.endswith("_sweep") and file == f"table: {(sweep / 'sweep.csv').relative_to(home)}"
        for seed in (0, 1):
            assert (sweep / f"seed={seed}" / "metrics.json").exists()
        assert (home / "swept" / "vqvae" / "latest").resolve() == sweep / "seed=1"
