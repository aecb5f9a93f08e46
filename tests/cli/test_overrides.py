"""Command-line words are quoted so that Hydra's grammar reads the same value."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cogview_pl.cli.overrides import quote_override


def value(word: str) -> object:
    """Value that Hydra reads from a quoted word."""
    parsed = OverridesParser.create().parse_overrides([quote_override(word)])[0].value()
    return [str(item) for item in parsed] if isinstance(parsed, list) else str(parsed)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("prompts=[红色的圆形]", ["红色的圆形"]),
        ("prompts=[红色的圆形,蓝色的心形]", ["红色的圆形", "蓝色的心形"]),
        ("prompts=[红色的圆形, 蓝色的心形]", ["红色的圆形", "蓝色的心形"]),
        ("prompts=[a red circle,蓝色的心形]", ["a red circle", "蓝色的心形"]),
        ("prompts=['红色，大的','蓝色']", ["红色，大的", "蓝色"]),
        ("prompts=[左上角有一个大的红色圆形（粉笔画）！]", ["左上角有一个大的红色圆形（粉笔画）！"]),
        ("data.urls=DIR/{000..009}.tar", "DIR/{000..009}.tar"),
        ("data.urls=/data/train/{noto,twemoji}-*.tar", "/data/train/{noto,twemoji}-*.tar"),
        ("data.urls={000..009}.tar", "{000..009}.tar"),
        ("data.urls={a,b}/{0..3}", "{a,b}/{0..3}"),
        ("data.urls=[a/{x,y}.tar,b/{0..3}.tar]", ["a/{x,y}.tar", "b/{0..3}.tar"]),
        ("data.root=/数据/图片", "/数据/图片"),
        ("data.root=~/图片/猫 狗", "~/图片/猫 狗"),
        ("prompts=-", "-"),
        ("data.style_patterns=[{text}的{style}图像,{style}: {text}]", ["{text}的{style}图像", "{style}: {text}"]),
    ],
)
def test_what_people_type_means_what_it_says(word: str, meant: object) -> None:
    assert value(word) == meant


def test_a_mapping_may_have_chinese_keys() -> None:
    node = OmegaConf.create({"styles": value("data.styles={油画: /数据/a b, 素描: ~/b}")})
    assert node.styles == {"油画": "/数据/a b", "素描": "~/b"}


@pytest.mark.parametrize(
    "word",
    [
        "task=vqvae",
        "seed=0,1,2",
        "optimizer.optimizer.lr=1e-3",
        "optimizer.optimizer.betas=[0.9,0.98]",
        "template.loss={text: 0.1, image: 1.0}",
        "data.styles={oil: DIR/a}",
        "a={b: {c: 1}}",
        "data.styles={}",
        "data.image_size=${image_tokenizer.image_size}",
        "~callbacks.progress",
        "+trainer.fast_dev_run=true",
        'prompts=["红色的圆形"]',
        "--help",
        "-m",
        "seed=range(0,5)",
    ],
)
def test_what_hydra_reads_already_is_left_alone(word: str) -> None:
    assert quote_override(word) == word
