"""Every limit at its ends, and for numbers that are none; which keys have which limit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from cogview_pl import limits
from cogview_pl.config.limits import check_limits
from cogview_pl.errors import UserError
from cogview_pl.limits import Limit, out_of_range, share

from ..composed import composition

TINY, NEARLY_1, OVER_1 = math.ulp(0.0), math.nextafter(1, 0), math.nextafter(1, 2)
HUGE = 10**400
"""A whole number that no float can hold."""

INSIDE: dict[str, tuple[Limit, list[float], list[float]]] = {
    "count": (limits.COUNT, [1, 1.0, 2, 2**31 - 1], [0, -1, 0.5, 1.5, 2**31, HUGE, -HUGE]),
    "seed_number": (limits.SEED, [0, 1, 4294967295], [-1, 4294967296, 0.5, HUGE]),
    "at_least_0": (limits.AT_LEAST_0, [0, 0.0, 1e-9, 1, 1e9], [-TINY, TINY, 1e-310, -1, 1e38, HUGE]),
    "above_0": (limits.ABOVE_0, [1e-9, 1, 1e9], [0, 0.0, -0.0, TINY, -TINY, -1, 1e38, HUGE]),
    "share": (limits.SHARE, [0, 0.5, 1, 1.0], [-TINY, OVER_1, 2, -1]),
    "share_below_1": (limits.SHARE_BELOW_1, [0, 0.5, NEARLY_1], [-TINY, 1, 1.0, OVER_1]),
    "share_above_0": (limits.SHARE_ABOVE_0, [1e-9, 0.5, 1], [0, 0.0, TINY, OVER_1, -1]),
    "temperature": (limits.TEMPERATURE, [0, 1e-6, 1, 1e6], [-1, TINY, 1e-310, 1e7, 1e38, HUGE]),
    "top_p": (limits.TOP_P, [1e-6, 0.5, 1], [0, TINY, 1e-320, OVER_1, -1]),
    "guidance": (limits.GUIDANCE, [0, 1, 3.5, 100], [-TINY, -1, 101, 1e38, HUGE]),
    "finite": (limits.FINITE, [0, -1, 1.5, -1e300, HUGE, -HUGE], []),
}
"""Limit, numbers inside and numbers outside of it."""


@pytest.mark.parametrize("name", INSIDE)
def test_ends_of_a_range(name: str) -> None:
    limit, inside, outside = INSIDE[name]
    assert [number for number in inside if not limit.holds(number)] == []
    assert [number for number in (*outside, math.nan, math.inf, -math.inf) if limit.holds(number)] == []


@pytest.mark.parametrize("name", [name for name in INSIDE if hasattr(limits, name)])
def test_a_field_carries_its_limit(name: str) -> None:
    made = getattr(limits, name)()

    @dataclass
    class Options:
        number: float = made

    limit, inside, _ = INSIDE[name]
    assert list(out_of_range(Options(inside[0]))) == []
    ((key, value, words),) = out_of_range(Options(math.nan))
    assert (key, words) == ("number", limit.words) and math.isnan(value)


def test_defaults() -> None:
    @dataclass
    class Options:
        some: int | None = limits.count(None)
        floor: int = limits.at_least_0(3)

    assert Options() == Options(None, 3)
    assert list(out_of_range(Options())) == []


@dataclass
class Inner:
    width: int = 1
    rates: list[float] = share()


@dataclass
class Outer:
    plain: float = 0.0
    name: str = "x"
    switch: bool = True
    optional: float | None = limits.above_0(None)
    inner: Inner = field(default_factory=Inner)
    anything: object = None


def test_lists_dataclasses_and_what_is_no_number() -> None:
    assert list(out_of_range(Outer(inner=Inner(rates=[0, 1.0])))) == []
    assert list(out_of_range(Outer(inner=Inner(rates=[0.5, 2, -1])))) == [
        ("inner.rates[1]", 2, "between 0 and 1"),
        ("inner.rates[2]", -1, "between 0 and 1"),
    ]
    assert list(out_of_range(Outer(optional=-1, plain=math.inf, inner=Inner(rates=[])))) == [
        ("plain", math.inf, "a finite number"),
        ("optional", -1, "from 1e-9 to 1e9"),
    ]
    assert list(out_of_range(Outer(anything={"lr": math.nan}, inner=Inner(rates=[])))) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=-1"], "seed=-1 must be a whole number from 0 to 4294967295"),
        (["data.batch_size=0"], "data.batch_size=0 must be a whole number from 1 to 2147483647"),
        (["model.dropout=nan"], "model.dropout=nan must be at least 0, below 1"),
        (["sampler.temperature=inf"], "sampler.temperature=inf must be 0, or from 1e-6 to 1e6"),
        (["sampler.temperature=1e-310"], "sampler.temperature=1e-310 must be 0, or from 1e-6 to 1e6"),
        (["sampler.guidance=1e38"], "sampler.guidance=1e+38 must be from 0 to 100"),
        (["sampler.top_p=1e-320"], "sampler.top_p=1e-320 must be from 1e-6 to 1"),
        (["template.loss.text=nan"], "template.loss.text=nan must be 0, or from 1e-9 to 1e9"),
        (["image_tokenizer.std=[1,0,1]"], "image_tokenizer.std[1]=0.0 must be from 1e-9 to 1e9"),
        (["optimizer.optimizer.lr=inf"], "optimizer.optimizer.lr=inf must be 0, or from 1e-9 to 1e9"),
        (["optimizer.weight_decay=1e300"], "optimizer.weight_decay=1e+300 must be 0, or from 1e-9 to 1e9"),
        (["optimizer.warmup=1.5"], "optimizer.warmup=1.5 must be between 0 and 1"),
        (["image_tokenizer.quantizer.decay=nan"], "image_tokenizer.quantizer.decay=nan must be a finite number"),
        (["image_tokenizer.mean=[0.5,nan,0.5]"], r"image_tokenizer.mean[1]=nan must be a finite number"),
        (["trainer.max_steps=0"], "trainer.max_steps=0 must be a whole number from 1 to 2147483647"),
        (["trainer.max_steps=true"], "trainer.max_steps=True must be a whole number from 1 to 2147483647"),
        (["trainer.max_steps=inf"], "trainer.max_steps=inf must be a whole number from 1 to 2147483647"),
        (["trainer.max_steps=nan"], "trainer.max_steps=nan must be a whole number from 1 to 2147483647"),
        (["trainer.max_steps=[1]"], "trainer.max_steps=[1] must be a whole number from 1 to 2147483647"),
        (
            ["trainer.val_check_interval=0.5"],
            "trainer.val_check_interval=0.5 must be a whole number from 1 to 2147483647",
        ),
        (["trainer.log_every_n_steps=0"], "trainer.log_every_n_steps=0 must be a whole number from 1 to 2147483647"),
        (["callbacks.throughput.peak_tflops=inf"], "callbacks.throughput.peak_tflops=inf must be from 1e-9 to 1e9"),
        (
            ["callbacks.nan_guard.patience=x"],
            "callbacks.nan_guard.patience=x must be a whole number from 1 to 2147483647",
        ),
    ],
)
def test_one_line_for_a_number_out_of_range(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        check_limits(composition("task=pretrain", *overrides))
    assert str(refused.value) == message


@pytest.mark.parametrize("task", ["vqvae", "pretrain", "generate", "evaluate", "features"])
def test_shipped_numbers_are_in_range(task: str) -> None:
    check_limits(composition(f"task={task}"))
