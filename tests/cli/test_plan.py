"""plan=true: its estimate against the memory of runs, and runs that it stops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peaks import measure_apart
from benchmarks.random_runs import make_model, make_tokens
from cogview_pl.assembly.checks import check_training
from cogview_pl.config.parts import training_options
from cogview_pl.config.schema import Config
from cogview_pl.errors import UserError
from cogview_pl.memory.cards import CARDS, card_bytes
from cogview_pl.memory.suggestions import for_inference, for_training, tensor_parallel
from cogview_pl.memory.table import Plan
from cogview_pl.tasks.plan import advise, estimate, make_plan, require_fit
from cogview_pl.tasks.plan import run as plan

from ..composed import composed
from .conftest import CommandLine

FOUR_BILLION = ("task=pretrain", "model=cogview_4b", "precision=bf16", "data.batch_size=8")
FEW_STEPS = ("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "data.val_size=4")
START = "init_from=outputs/pretrain/latest"
PROMPTS = "prompts=[红圆,蓝方,绿心,红心]"


def planned(*overrides: str) -> Plan:
    return make_plan(composed(*overrides), recomposed(*overrides))


def recomposed(*overrides: str) -> Callable[[str], Config]:
    return lambda more: composed(*overrides, *more.split())


def generating(*overrides: str) -> dict[str, float]:
    return dict(planned("task=generate", *overrides).figures)


def cache_bytes(*overrides: str) -> float:
    return generating(*overrides)["memory/kv_cache_bytes"]


def test_guidance_doubles_the_cache() -> None:
    assert cache_bytes("sampler.guidance=3") == 2 * cache_bytes()


def test_the_cache_is_in_fp32_on_a_cpu_and_as_the_weights_on_a_gpu() -> None:
    figures = generating("precision=bf16")
    assert figures["memory/kv_cache_bytes"] == cache_bytes()
    assert figures["memory_of_gpu/kv_cache_bytes"] == cache_bytes() / 2


def test_quantized_weights_are_counted() -> None:
    options = ("precision=bf16", "model=cogview_4b")
    plain, int8, int4 = (generating(f"quantization={weights}", *options) for weights in ("null", "int8", "int4"))
    key, hidden_size, layers = "memory_of_gpu/sequence_models_bytes", 2560, 48
    assert plain[key] == 2 * plain["sequence_model/parameters"]
    assert plain[key] - int8[key] == 12 * layers * hidden_size**2
    assert int4[key] < int8[key]
    assert int4["memory_of_gpu/kv_cache_bytes"] == plain["memory_of_gpu/kv_cache_bytes"]


@pytest.mark.slow
def test_released_size_has_its_published_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    figures = plan(composed(*FOUR_BILLION), pytest.fail, recomposed(*FOUR_BILLION))
    assert figures["sequence_model/parameters"] == 3_928_849_920
    assert "3,928,849,920" in capsys.readouterr().out
    held = figures["memory_of_gpu/weights_bytes"] + figures["memory_of_gpu/optimizer_bytes"]
    tensors = 48 * 16 + 4  # AdamW has a step counter of four bytes per tensor
    assert held == (4 + 8) * figures["sequence_model/parameters"] + 4 * tensors
    none, selective, block = (figures[f"memory/activations_{name}_bytes"] for name in ("none", "selective", "block"))
    assert none > selective > block


def test_the_first_suggestion_that_fits_is_named() -> None:
    config = composed(*FOUR_BILLION)
    assert [card for card in CARDS if estimate(config, True).total <= card_bytes(card)] == [141]
    advice = suggested(80, *FOUR_BILLION)
    assert advice == "activation_checkpointing=block"
    assert estimate(composed(*FOUR_BILLION, *advice.split()), True).total <= card_bytes(80)


def suggested(card: int, *overrides: str) -> str:
    available = {"card": card_bytes(card)}
    return advise(composed(*overrides), recomposed(*overrides), on_gpu=True, available=available)["card"]


STYLE = ("task=style", "model=cogview_4b", "data.styles=[oil]")


@pytest.mark.parametrize(
    ("card", "wanted", "overrides"),
    [
        (24, "lora.rank=8", (*STYLE, "precision=bf16", "data.batch_size=1")),
        pytest.param(
            *(24, "strategy=fsdp trainer.devices=", (*FOUR_BILLION, "data.batch_size=1")), marks=pytest.mark.slow
        ),
        pytest.param(
            *(32, "precision=bf16_true optimizer=adamw_8bit", (*FOUR_BILLION[:2], "data.batch_size=1")),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_suggestions_are_what_a_run_accepts(card: int, wanted: str, overrides: tuple[str, ...]) -> None:
    pytest.importorskip("torchao")
    advice = suggested(card, *overrides)
    assert wanted in advice
    config = composed(*overrides, *advice.split())
    check_training(training_options(config), shardable=True)
    assert estimate(config, True).total <= card_bytes(card)


def test_a_gpu_trains_large_models_in_bf16() -> None:
    options = training_options(composed(*STYLE))
    for large in (False, True):
        train = for_training(options, 8, sequences=True, checkpoints=True, copies=False, on_gpu=True, large=large)
        generate = for_inference("sampler.batch_size", 8, halves=True, quantizes=True, large=large)
        for families in (train, generate):
            first = next(words.split() for family in families for words in family)
            assert ("precision=bf16" in first) == large
    assert all("precision=bf16" in words for family in train for words in family)


def test_what_a_strategy_refuses_is_not_suggested() -> None:
    sharded = (*FOUR_BILLION, "strategy=fsdp", "trainer.devices=2")
    tried: list[str] = []

    def recompose(more: str) -> Config:
        tried.append(more)
        return composed(*sharded, *more.split())

    found = advise(composed(*sharded), recompose, on_gpu=True, available={"card": card_bytes(24)})
    assert any("adamw_8bit" in words for words in tried)
    assert "adamw_8bit" not in found["card"]
    assert len(set(tried)) == len(tried)


ONE_EACH = (*FOUR_BILLION[:2], "data.batch_size=1", "activation_checkpointing=block", "strategy=ddp")


def test_devices_that_a_run_has_share_the_model() -> None:
    """They are not exchanged for fewer."""
    overrides = (*ONE_EACH, "precision=bf16", "trainer.devices=8", "trainer.num_nodes=64")
    assert suggested(80, *overrides) == "strategy=fsdp"


@pytest.mark.slow
def test_averages_need_full_weights_and_are_not_sharded() -> None:
    overrides = (*ONE_EACH, "precision=bf16", "trainer.devices=8", "callbacks.ema.decay=0.9")
    assert estimate(composed(*overrides), True).total > card_bytes(80)
    assert "strategy=fsdp" not in suggested(80, *overrides)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (("precision=fp16",), "precision=bf16 strategy=fsdp"),
        (("optimizer=muon",), "strategy=fsdp optimizer=adamw"),
        (("strategy=fsdp", "model=tiny", "trainer.num_nodes=2"), "trainer.devices=4"),
    ],
)
def test_sharding_comes_with_what_it_needs(more: tuple[str, ...], wanted: str) -> None:
    options = training_options(composed(*ONE_EACH, "trainer.devices=2", *more))
    families = for_training(options, 1, sequences=True, checkpoints=False, copies=False, on_gpu=True, large=False)
    found = [words for family in families for words in family if wanted in words]
    assert found
    for words in found:
        check_training(
            training_options(composed(*ONE_EACH, "trainer.devices=2", *more, *words.split())), shardable=True
        )


def test_a_model_is_divided_where_its_heads_can_be() -> None:
    trainer = {"devices": 1, "num_nodes": 1}
    assert tensor_parallel(trainer, 12) == [f"strategy=tp trainer.devices={count}" for count in (2, 4)]
    assert tensor_parallel({"devices": 2, "num_nodes": 2}, 40) == ["strategy=tp", "strategy=tp trainer.devices=4"]
    assert tensor_parallel(trainer, 7) == []


def test_the_copy_of_a_checkpoint_is_planned_and_can_be_saved() -> None:
    """Weights, AdamW's two moments and the image tokenizer; on a GPU it lies in main memory."""
    overrides = ("task=pretrain", "data.batch_size=1", "callbacks.checkpoint.background_mb=1")
    found = estimate(composed(*overrides), False)
    parts = found.peak
    tokenizer = parts["image_tokenizer"]
    assert parts["checkpoint_copy"] == parts["weights"] + parts["optimizer"] + tokenizer > 1e6
    assert not estimate(composed(*overrides), True).peak["checkpoint_copy"]
    assert not estimate(composed(*overrides, "callbacks.checkpoint.background_mb=1000"), False).peak["checkpoint_copy"]
    available = {"here": found.total - 1}
    advice = advise(composed(*overrides), recomposed(*overrides), on_gpu=False, available=available)
    assert advice["here"] == "callbacks.checkpoint.background_mb=null"


@pytest.mark.slow
def test_adapters_are_planned_as_what_they_are() -> None:
    style = ("task=style", "model=small", "data.styles=[oil]", "precision=bf16")
    plain, lora = (planned(*style, f"lora.rank={rank}").figures for rank in (0, 8))
    layers, hidden_size = (getattr(composed(*style).model, name) for name in ("num_layers", "hidden_size"))
    key = "sequence_model/trained_parameters"
    assert plain[key] == plain["sequence_model/parameters"] == lora["sequence_model/parameters"]
    assert lora[key] == layers * 16 * 8 * hidden_size  # rows and columns of four maps of rank 8
    frozen_in_half = layers * (12 * hidden_size**2 + 9 * hidden_size)
    assert lora["memory_of_gpu/weights_bytes"] == 4 * (plain[key] + lora[key]) - 2 * frozen_in_half
    assert lora["memory_of_gpu/optimizer_bytes"] == pytest.approx(8 * lora[key], rel=0.001)


def test_devices_of_tensor_parallelism_share_a_batch() -> None:
    tp, ddp = (planned("task=pretrain", f"strategy={name}", "trainer.devices=2").figures for name in ("tp", "ddp"))
    assert ddp["sequence_model/tokens_per_step"] == 2 * tp["sequence_model/tokens_per_step"]
    assert tp["memory/weights_bytes"] < ddp["memory/weights_bytes"]


def test_a_run_that_cannot_fit_is_stopped_in_one_line() -> None:
    huge = ("task=pretrain", "data.batch_size=4000000")
    with pytest.raises(UserError, match=r"this run needs .* GiB .*plan\.strict=false"):
        require_fit(composed(*huge), recomposed(*huge))
    require_fit(composed(*huge, "plan.strict=false"), pytest.fail)


LEFT_OUT = ("super_resolution", "style", "features", "magnified", "styled", "styles_evaluated", "every_style", "ranked")
"""Stages of the quickstart that are planned as others are."""


def test_command_line(cli: CommandLine, tmp_path: Path) -> None:
    plans = [
        ("task=pretrain", "plan=true"),
        ("experiment=quickstart", "plan=true", "plan.strict=false", *(f"~stages.{stage}" for stage in LEFT_OUT)),
        *((f"task={task}", "plan=true") for task in ("vqvae", "tokenize", "magnify", "rerank", "features", "evaluate")),
        ("task=convert", "convert.source=.", "convert.target=there", "plan=true"),
    ]
    refused = ("task=pretrain", "data.batch_size=4000000")
    *printed, stopped = cli.run_many([(words, tmp_path) for words in (*plans, refused)], tmp_path)
    for words, ended in zip(plans, printed, strict=True):
        assert ended.code == 0, (words, ended.stderr[-2000:])
        assert "141 GB" in ended.stdout
    assert "GiB and fits on" in printed[0].stdout.splitlines()[0]
    assert "[pretrain]" in printed[1].stdout
    assert stopped.code == 2
    assert stopped.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").glob("*/*"))


BF16_BLOCK = ("activation_checkpointing=block", "precision=bf16")
MUON_SELECTIVE = ("activation_checkpointing=selective", "optimizer=muon", "data.batch_size=4")
LORA = ("lora.rank=4", "data.batch_size=16")


def param(*overrides: str, id: str, slow: bool = False) -> Any:
    return pytest.param(overrides, id=id, marks=[pytest.mark.slow] if slow else [])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random tokens and weights of the tiny model."""
    folder = tmp_path_factory.mktemp("measured")
    for make in (make_tokens, make_model):
        make(folder / "outputs", ["task=pretrain", "model=tiny"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        param(
            "task=vqvae",
            "data.train_size=64",
            "image_tokenizer.quantize_after_steps=1",
            *FEW_STEPS,
            id="vqvae",
            slow=True,
        ),
        param("task=pretrain", *FEW_STEPS, id="pretrain"),
        param("task=pretrain", *BF16_BLOCK, *FEW_STEPS, id="bf16-block", slow=True),
        param("task=pretrain", *MUON_SELECTIVE, *FEW_STEPS, id="muon-selective", slow=True),
        param("task=pretrain", START, *LORA, *FEW_STEPS, id="lora", slow=True),
        param("task=pretrain", START, *LORA, "precision=bf16", *FEW_STEPS, id="lora-bf16", slow=True),
        param("task=generate", PROMPTS, "num_images_per_prompt=8", "sampler.guidance=2", id="generate", slow=True),
    ],
)
def test_tiny_runs_take_what_was_planned(home: Path, overrides: tuple[str, ...]) -> None:
    assert measure_apart(overrides, home).error == pytest.approx(0, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["live", "resident"])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_small_fits_take_what_was_planned(tmp_path: Path, checkpointing: str, how: str) -> None:
    make_tokens(tmp_path / "outputs", ["task=pretrain", "model=small"])
    fit = ("task=pretrain", "model=small", "~callbacks.samples", "data.batch_size=32", *FEW_STEPS)
    fit += ("callbacks.checkpoint.background_mb=null",)  # the last checkpoint has no copy, and two steps make no other
    found = measure_apart((*fit, f"activation_checkpointing={checkpointing}"), tmp_path, how)
    assert found.error == pytest.approx(0, abs=0.1)
