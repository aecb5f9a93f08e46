"""Which keys a configuration may have: those of the schema, and added ones that somebody reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from cogview_pl.config.choices import Verb
from cogview_pl.config.keys import check_keys, nearest_words, unknown_key
from cogview_pl.config.schema import register_schemas
from cogview_pl.errors import UserError

from ..composed import composition


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("+trainer.benchmark=true", "trainer.benchmark", True),
        ("+trainer.overfit_batches=2", "trainer.overfit_batches", 2),
        ("+optimizer.optimizer.amsgrad=true", "optimizer.optimizer.amsgrad", True),
        ("+callbacks.mine={_target_: a.B, c: 1}", "callbacks.mine.c", 1),
        ("+callbacks.throughput.peak=1", "callbacks.throughput.peak", 1),
        ("+logger.csv._target_=a.B", "logger.csv._target_", "a.B"),
        ("+strategy.strategy.gradient_as_bucket_view=true", "strategy.strategy.gradient_as_bucket_view", True),
        ("+template.loss.second=1.0", "template.loss.second", 1.0),
        ("+template.loss={second: 1.0}", "template.loss.second", 1.0),
        ("+stages.first=['task=vqvae']", "stages.first", ["task=vqvae"]),
        ("+precision.plugins=[]", "precision.plugins", []),
    ],
)
def test_added_keys_that_somebody_reads(word: str, key: str, value: Any) -> None:
    config = composition("task=pretrain", "strategy=ddp", word)
    check_keys(config)
    assert OmegaConf.select(config, key) == value


@pytest.mark.parametrize(
    "task",
    ["vqvae", "tokenize", "pretrain", "generate", "super_resolution", "style", "caption", "style_transfer", "edit"],
)
@pytest.mark.parametrize("compat", ["none", "official"])
def test_no_shipped_key_is_unknown(task: str, compat: str) -> None:
    check_keys(composition(f"task={task}", f"compat={compat}"))


@pytest.mark.parametrize("task", ["magnify", "rerank", "features", "evaluate", "chain"])
@pytest.mark.parametrize("data", ["toy", "folder"])
def test_no_shipped_key_of_other_tasks_is_unknown(task: str, data: str) -> None:
    check_keys(composition(f"task={task}", f"data={data}"))


def test_a_key_without_a_value() -> None:
    with pytest.raises(
        UserError, match=r"^convert\.source has no value; set it on the command line: convert\.source=…$"
    ):
        check_keys(composition("task=convert"))


def test_a_dataclass_that_extends_dict_may_have_any_key() -> None:
    @dataclass
    class Open(dict[str, Any]):
        known: int = 1

    @dataclass
    class Closed:
        known: int = 1

    base = {"trainer": {}, "precision": {}, "mine": OmegaConf.structured(Open)}
    config = OmegaConf.create(base)
    OmegaConf.update(config, "mine.other", 2, force_add=True)
    check_keys(config)
    config = OmegaConf.create({**base, "mine": OmegaConf.structured(Closed)})
    OmegaConf.update(config, "mine.other", 2, force_add=True)
    with pytest.raises(UserError, match=r"^mine\.other: there is no such key$"):
        check_keys(config)


def test_nearest_words() -> None:
    assert nearest_words("tny", ["base", "tiny", "small"]) == ["tiny"]
    assert nearest_words("layer", ["num_layers", "norm", "player"]) == ["player", "num_layers"]
    assert nearest_words("rate", ["my_learning_rate", "a_rate_of_change", "no_such_rate", "a_longer_rate"]) == [
        "my_learning_rate",
        "a_rate_of_change",
        "no_such_rate",
    ]
    assert nearest_words("foo", ["base", "tiny"]) == []


@pytest.mark.parametrize(
    ("key", "guesses"),
    [
        ("b.size", " (did you mean b.x.size or a.size?)"),  # the same last word, the same node first
        ("a.siz", " (did you mean a.size?)"),  # the same node
        ("c.wieght", " (did you mean b.weight?)"),  # elsewhere
        ("a.foo", ""),
        ("weight", " (did you mean b.weight?)"),
        ("hydr", ""),
        ("a.size", " (did you mean b.x.size?)"),  # not itself, where it has been added
    ],
)
def test_nearest_keys(key: str, guesses: str) -> None:
    root = OmegaConf.create({"a": {"size": 1}, "b": {"x": {"size": 1}, "weight": 2}, "hydra": {"weights": 1}})
    assert unknown_key(key, root) == f"{key}: there is no such key{guesses}"


def test_verbs_in_parallel_and_with_an_estimate() -> None:
    assert [verb.name for verb in Verb if verb.trains_in_parallel] == ["fit_image_tokenizer", "fit_sequence_model"]
    assert [verb.name for verb in Verb if verb.must_fit] == ["fit_image_tokenizer", "fit_sequence_model", "generate"]


def test_groups_that_help_lists_are_folders_of_conf() -> None:
    register_schemas()
    conf = Path(__file__).parents[2] / "conf"
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        groups = GlobalHydra.instance().config_loader().list_groups("")
    ours = set(groups) - {"hydra", "experiment"}
    assert ours == {path.name for path in conf.iterdir() if path.is_dir()} - {"hydra"}
