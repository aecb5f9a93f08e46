"""The runs of the fault campaign and their inputs: all are tiny and take a second or less."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from PIL import Image

from cogview_pl.config.choices import Verb
from cogview_pl.runs.interrupted import can_go_on
from tests.faults.outcomes import EVERY

QUIET = ("seed=5", "threads=1", "logger=none")
SMALL = ("image_tokenizer.image_size=32", "text.vocab_size=320")
STEPS = (
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    f"callbacks.checkpoint.every_n_train_steps={EVERY}",
    "trainer.log_every_n_steps=2",
    "data.batch_size=4",
    "~callbacks.progress",
)
WITHOUT_LOG = ("~callbacks.learning_rate",)
FIRST_STAGE = (
    "image_tokenizer.hidden_size=8",
    "image_tokenizer.codebook_dim=8",
    "image_tokenizer.codebook_size=32",
    "image_tokenizer.residual_blocks=0",
    "image_tokenizer.quantize_after_steps=2",
    "image_tokenizer.quantizer.kmeans_iters=1",
)
MODEL = ("model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.dropout=0.1")
SECOND_STAGE = (*STEPS, *MODEL, "~callbacks.samples")
LOGGED = ("logger=tensorboard", "callbacks.learning_rate.logging_interval=step")
TWENTY = ("data.train_size=20", "data.val_size=4")
EVERY_BATCH = "token_store.commit_seconds=0"
TOKENISING = ("task=tokenize", "data.batch_size=2", EVERY_BATCH, "image_tokenizer.path={home}/vqvae")
FOLDER = ("data=folder", "data.root={home}/images", "data.val_fraction=0.3", "data.max_skipped_share=0.5")
WORKERS = ("data.num_workers=2",)
GENERATE = ("task=generate", "sampler.batch_size=2", "data.val_size=6")
LORA = ("lora.rank=2", "lora.targets=[qkv]")
STYLES = ("data.styles=[oil,ink]", *TWENTY)
CHAINED = (
    *("task=vqvae", *STEPS, *FIRST_STAGE, *LOGGED, "data.train_size=18", "data.val_size=4"),
    "callbacks.reconstructions.num_images=2",
)
TOKENISED = ("task=tokenize", "data.batch_size=2", EVERY_BATCH, "data.train_size=12", "data.val_size=4")


def _quoted(words: Iterable[str]) -> str:
    """Words of a command line, as a list in a single word."""
    return ",".join(f"'{word}'" for word in words)


@dataclass(frozen=True)
class Recipe:
    """Configuration of a subject; `{home}` is the folder of the campaign, `{place}` the folder of the run."""

    overrides: tuple[str, ...]
    reads: Mapping[str, str] = field(default_factory=dict)
    """Input, relative to `{home}` → a word in the message that says that it has changed."""
    begins_anew: bool = False
    """Whether it cannot be resumed."""


RECIPES = {
    "vqvae": Recipe(("task=vqvae", *STEPS, *FIRST_STAGE, *WITHOUT_LOG, "data.train_size=18", "data.val_size=4")),
    "tokenize": Recipe((*TOKENISING, *TWENTY), {"vqvae": "image_tokenizer"}),
    "pretrain": Recipe(
        ("task=pretrain", *SECOND_STAGE, *WITHOUT_LOG, "data.token_store={home}/tokenize"),
        {"tokenize": "data.token_store"},
    ),
    "vqvae with a log": Recipe(CHAINED),
    "pretrain with a log": Recipe(
        ("task=pretrain", *STEPS, *MODEL, *LOGGED, "data.token_store={home}/tokenize",
         "callbacks.samples.num_prompts=2"),
        {"tokenize": "data.token_store"},
    ),
    "vqvae with workers": Recipe(
        ("task=vqvae", *STEPS, *FIRST_STAGE, *WITHOUT_LOG, *FOLDER, *WORKERS), {"images": "data ("}
    ),
    "tokenize with workers": Recipe(
        (*TOKENISING, *FOLDER, *WORKERS), {"images": "data (", "vqvae": "image_tokenizer"}
    ),
    "pretrain with workers": Recipe(
        ("task=pretrain", *SECOND_STAGE, *WITHOUT_LOG, *WORKERS, "data.token_store={home}/tokenize"),
        {"tokenize": "data.token_store"},
    ),
    "shards": Recipe(
        (*TOKENISING, "data=webdataset", "data.urls={home}/tars/*.tar", "data.caption_field=txt",
         "data.val_fraction=0.2", "data.max_skipped_share=0.5"),
        {"tars": "data (", "vqvae": "image_tokenizer"},
    ),
    "caption": Recipe(
        ("task=caption", *STEPS, *MODEL, *LOGGED, *LORA, "lora.merge=false", "~callbacks.samples",
         "init_from={home}/pretrain", "data.token_store={home}/tokenize"),
        {"tokenize": "data.token_store", "pretrain": "init_from"},
    ),
    "style": Recipe(
        ("task=style", *SECOND_STAGE, *WITHOUT_LOG, *LORA, *STYLES, "init_from={home}/pretrain",
         "sequences.replay_store={home}/tokenize", "sequences.conditioning_dropout=0.2", "sequences.token_noise=0.2"),
        {"tokenize": "sequences.replay_store", "pretrain": "init_from"},
    ),
    "super_resolution": Recipe(
        ("task=super_resolution", *SECOND_STAGE, *WITHOUT_LOG, *TWENTY, "init_from={home}/pretrain",
         "sequences.conditioning_dropout=0.1", "sequences.token_noise=0.2"),
        {"pretrain": "init_from"},
    ),
    "generate": Recipe(
        (*GENERATE, "init_from={home}/pretrain", "num_prompts=6", "num_images_per_prompt=2"), {"pretrain": "init_from"}
    ),
    "generate by an adapter": Recipe(
        (*GENERATE, "init_from={home}/style/adapter", "num_prompts=3"), {"style": "init_from", "pretrain": "init_from"}
    ),
    "generate, ranked": Recipe(
        (*GENERATE, "init_from={home}/pretrain", "rerank_with={home}/caption", "num_prompts=4",
         "num_images_per_prompt=2",
         "top_n=1"),
        {"pretrain": "/pretrain", "caption": "rerank_with"},
    ),
    "describe": Recipe((*GENERATE, "init_from={home}/caption", "num_prompts=4")),
    "features": Recipe(
        ("task=features", "data.train_size=24", "data.val_size=8", "data.batch_size=8", "features.epochs=2",
         "features.hidden_size=4", "features.num_features=8", "data.styles=[flat,oil]"),
        begins_anew=True,
    ),
    "evaluate": Recipe(
        ("task=evaluate", "pairs={home}/generate", "evaluate.features={home}/features", "evaluate.blur=[0,1]",
         "evaluate.metrics=[reconstruction,fid,is,caption_loss,toy]", "evaluate.is_splits=2", "data.batch_size=2",
         "data.val_size=6", "image_tokenizer.path={home}/vqvae", "rerank_with={home}/caption",
         "sampler.batch_size=2"),
        begins_anew=True,
    ),
    "compare": Recipe(("task=evaluate", "evaluate.compare=[{home}/evaluate,{home}/evaluate]"), begins_anew=True),
    "magnify": Recipe(
        ("task=magnify", "pairs={home}/generate", "upscale_with={home}/super_resolution", "sampler.batch_size=4"),
    ),
    "rerank": Recipe(
        ("task=rerank", "pairs={home}/generate", "rerank_with={home}/caption", "sampler.batch_size=2"),
    ),
    "chain": Recipe(
        ("task=chain", "outputs={place}/outputs", "logger=tensorboard",
         f"+stages.first=[{_quoted(CHAINED)}]", f"+stages.second=[{_quoted(TOKENISED)}]"),
        begins_anew=True,
    ),
}  # fmt: skip
"""Name of a subject → its recipe; each subject reads only results of earlier ones."""

OTHERS = {
    "vqvae": ("seed=6",),
    "tokenize": ("data.seed=9", "text.model={home}/tokenize/text.model"),
    "pretrain": ("seed=6",),
    "caption": ("seed=6",),
    "style": ("seed=6",),
}
"""Name of a subject that others read → overrides that make a different one."""


@dataclass(frozen=True)
class Subject:
    """A run that faults are injected into."""

    name: str
    recipe: Recipe
    config: DictConfig
    reference: dict[str, Any]
    """Result of an uninterrupted run."""
    files: tuple[str, ...]
    """All files of an uninterrupted run."""
    seconds: float
    calls: int
    """Number of its fsync and replace calls."""
    moments: int
    """Number of its checks for signals."""
    before_checkpoint: int
    """Number of checks for signals before the first checkpoint."""
    largest: int
    """Size of its largest file in bytes."""
    total: int
    """Size of all files in bytes."""

    @property
    def trains(self) -> bool:
        """Whether it goes on from checkpoints."""
        return not self.recipe.begins_anew and self.before_checkpoint < self.moments

    @property
    def tokenises(self) -> bool:
        """Whether it trains on data that it has tokenised itself."""
        return "tokens/token_store/header.json" in self.files

    @property
    def has_workers(self) -> bool:
        """Whether other processes load its data."""
        return bool(self.config.data.num_workers)

    def can_go_on(self, run: Path) -> bool:
        """Whether it can be resumed."""
        return not self.recipe.begins_anew and can_go_on(run, Verb(self.config.verb).value)


def write_images(folder: Path) -> None:
    """Twelve images with captions; one of them is no image."""
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.png").write_bytes(image(number))
        (folder / f"{number:02d}.txt").write_text(_caption(number))
    (folder / "05.png").write_bytes(b"none")


def write_shards(folder: Path) -> None:
    """Twelve images with captions in two shards."""
    folder.mkdir()
    for shard in range(2):
        write_shard(folder / f"{shard}.tar", 6 * shard)


def write_shard(file: Path, first: int, changed: int = 0) -> None:
    """Six images with captions; with `changed`, other images under the same names."""
    with tarfile.open(file, "w") as tar:
        for number in range(first, first + 6):
            for extension, data in (("png", image(number + changed)), ("txt", _caption(number).encode())):
                info = tarfile.TarInfo(f"{number:02d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def image(number: int) -> bytes:
    """A PNG of noise."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _caption(number: int) -> str:
    return f"第{number}张红色的图"
