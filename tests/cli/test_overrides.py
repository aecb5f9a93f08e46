"""Command-line words are quoted so that Hydra's grammar reads the same value."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cogview_pl.cli.overrides import quote_override, quoted
from cogview_pl.config.text_keys import TEXT_KEYS, expand_home

from ..composed import composition

PARSER = OverridesParser.create()


def value(word: str) -> object:
    """Value that a run gets from a word. Another process of the run quotes the word once more."""
    once = quote_override(word)
    assert quote_override(once) == once
    OmegaConf.create([once])  # Hydra keeps the word, so OmegaConf must be able to parse it
    return OmegaConf.to_object(OmegaConf.create({"key": PARSER.parse_override(once).value()}))["key"]  # type: ignore


def values(word: str) -> list[object]:
    """Values that the runs of a sweep get."""
    swept = PARSER.parse_override(quote_override(word, sweeps=True))
    return [value(f"{swept.get_key_element()}={element}") for element in swept.sweep_string_iterator()]


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
        ("data.root=~/a (b)=c'd $e \\\\", "~/a (b)=c'd $e \\\\"),
        ("run_dir=/a=b", "/a=b"),
        ("run_dir=/[a]", "/[a]"),
        ("init_from=007", "007"),
        ("init_from=a, b", "a, b"),
        ("init_from='a b'", "a b"),
        ("init_from=null", None),
        ("resume=True", True),
        ("resume=auto", "auto"),
        ("images=[a b.png, c=d.png]", ["a b.png", "c=d.png"]),
        ("prompts=-", "-"),
        ("prompts=null", None),
        ("prompts=红色的圆形", "红色的圆形"),
        ("prompts=a red circle, big", "a red circle, big"),
        ("prompts=[a dog's ball]", ["a dog's ball"]),
        ("prompts=[it's, a 'big' cat, “c”]", ["it's", "a 'big' cat", "“c”"]),
        ("prompts=[a big cat!, a (big) cat, a=b, :(]", ["a big cat!", "a (big) cat", "a=b", ":("]),
        ("prompts=[1e3, 007, true, null, 1_000]", ["1e3", "007", "true", "null", "1_000"]),
        ("prompts=[costs $5, ${seed}, \\\\]", ["costs $5", "${seed}", "\\\\"]),
        ("""prompts=["it's, well", 'a']""", ["it's, well", "a"]),
        ("prompts=[]", []),
        ("template.restart_positions_at=[BASE]", "[BASE]"),
        ("callbacks.mine.names=[油画,1]", ["油画", 1]),
        ("data.styles={}", {}),
        ("data.styles={oil: DIR/a}", {"oil": "DIR/a"}),
        ("data.styles={油画: /数据/a b=c, 'a, b': ~/it's}", {"油画": "/数据/a b=c", "a, b": "~/it's"}),
        ("data.style_patterns=[{text}的{style}图像,{style}: {text}]", ["{text}的{style}图像", "{style}: {text}"]),
    ],
)
def test_what_people_type_means_what_it_says(word: str, meant: object) -> None:
    assert value(word) == meant


def test_a_path_may_name_another_key() -> None:
    word = quote_override("init_from=${outputs}/style/my run")
    config = OmegaConf.create({"outputs": "o", "init_from": PARSER.parse_override(word).value()})
    assert config.init_from == "o/style/my run"


def test_what_a_run_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = (
        "data.styles={油画: ~/a b=c, 'it\\'s, \"x\"': ~/d\\\\}",
        "prompts=[${seed}, a \\'b\\' \\\\]",
        "outputs=~/o",
    )
    config = composition("task=vqvae", "data=folder", *words, "init_from=${outputs}/it's")
    expand_home(config)
    assert config.data.styles == {"油画": "/home/me/a b=c", 'it\'s, "x"': "/home/me/d\\\\"}
    assert list(config.prompts) == ["${seed}", "a \\'b\\' \\\\"]
    assert config.init_from == "/home/me/o/it's"


_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20) | st.text(
    "ab ,'\"\\${}[]()=:~!?*\n红1", max_size=12
)
_UNQUOTED = _TEXT.map(str.strip).filter(lambda text: text and "," not in text and text[0] not in "'\"")


def _stripped(texts: object) -> list[str]:
    return [str(text).strip() for text in texts]  # type: ignore[attr-defined]  # blanks around a prompt do not count


@settings(max_examples=150, deadline=None)
@given(st.lists(_TEXT, min_size=1, max_size=4))
@example(["???"])
@example(["\\${a}\\"])
def test_any_list_of_quoted_texts_is_the_list_of_prompts(texts: list[str]) -> None:
    assert _stripped(value(f"prompts=[{','.join(map(quoted, texts))}]")) == _stripped(texts)


@settings(max_examples=150, deadline=None)
@given(st.lists(_UNQUOTED, min_size=1, max_size=4))
@example(["???"])
@example([":'", "0'"])
@example(["\\${a}\\"])
def test_any_list_of_texts_without_commas_needs_no_quotes(texts: list[str]) -> None:
    assert _stripped(value(f"prompts=[{','.join(texts)}]")) == texts


@settings(max_examples=150, deadline=None)
@given(_TEXT.map(str.strip).filter(lambda text: text and text[0] not in "'\"" and "${" not in text))
@example("a, b")
@example("[a]")
def test_any_path_arrives_as_it_was_typed(path: str) -> None:
    if path.lower() != "null" and path != "???":
        assert value(f"run_dir={path}") == path


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("prompts=红色,a (big) cat", ["红色", "a (big) cat"]),
        ("prompts=[红色,a],[it's]", [["红色", "a"], ["it's"]]),
        ("prompts=['a, b'],c", [["a, b"], "c"]),
        ("prompts='a, b',c", ["a, b", "c"]),
        ("init_from=/a=b,~/c d", ["/a=b", "~/c d"]),
        ("data.urls={000..009}.tar,{a,b}.tar", ["{000..009}.tar", "{a,b}.tar"]),
        ("prompts=choice(a,b)", ["a", "b"]),
    ],
)
def test_a_comma_separates_the_runs_of_a_sweep(word: str, meant: list[object]) -> None:
    assert values(word) == meant


def test_home_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = OmegaConf.create()
    for key in TEXT_KEYS:
        several: object = {"油画": "~/b"} if key == "data.styles" else ["~/a", "b~"]
        OmegaConf.update(config, key, several if TEXT_KEYS[key].several else "~/a")
    OmegaConf.update(config, "pairs", "${outputs}/c")
    expand_home(config)
    for key, form in TEXT_KEYS.items():
        if key not in ("data.styles", "pairs"):
            text = "/home/me/a" if form.path else "~/a"
            assert OmegaConf.select(config, key) == ([text, "b~"] if form.several else text)
    assert config.data.styles == {"油画": "/home/me/b"}
    assert config.pairs == "/home/me/a/c"


@pytest.mark.parametrize(
    "word",
    [
        "task=vqvae",
        "seed=0,1,2",
        "optimizer.optimizer.lr=1e-3",
        "optimizer.optimizer.betas=[0.9,0.98]",
        "template.loss={text: 0.1, image: 1.0}",
        "a={b: {c: 1}}",
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
