"""The toy world as a data set: fingerprints, styles and held-out combinations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from cogview_pl.errors import UserError
from cogview_pl.toy_world.captions import STYLES, parse_caption
from cogview_pl.toy_world.render import render
from cogview_pl.toy_world.scene import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    styles_held_out,
)

from .toy_images import toy_images

PATTERNS = ("{text}的{style}图像", "{style}风格的{text}")


class TestDataset:
    def test_the_fingerprint_is_that_of_the_settings(self) -> None:
        plain: dict[str, Any] = {"split": "train", "size": 10, "seed": 1}
        changes: tuple[dict[str, Any], ...] = (
            {"split": "val"},
            {"size": 11},
            {"seed": 2},
            {"image_size": 32},
            {"language": "en"},
            {"styles": ("oil",)},
            {"style_patterns": PATTERNS},
            {"object_probabilities": (1.0,)},
        )
        found = [toy_images(**plain | change).fingerprint() for change in ({}, *changes)]
        assert toy_images(**plain).fingerprint() == found[0] and len(found[0]) == 32
        assert len(set(found)) == 1 + len(changes)

    def test_samples_depend_on_the_index_only(self) -> None:
        data = toy_images("train", 12, seed=3, styles=("flat", "ink"), style_patterns=PATTERNS)
        loaded = list(DataLoader(data, batch_size=None, num_workers=2))
        for i in reversed(range(12)):
            assert loaded[i].key == data[i].key
            assert loaded[i].text == data[i].text == data.text(i)
            assert torch.equal(loaded[i].image, data[i].image)
        assert len({sample.key for sample in loaded}) == len(data) == 12

    def test_samples_of_a_later_pass_are_those_of_the_first(self) -> None:
        options: dict[str, Any] = {"image_size": 32, "seed": 3, "styles": ("flat", "oil")}
        fresh = [toy_images("train", 6, **options)[i] for i in range(6)]
        data = toy_images("train", 6, cache_mb=3 * 32**2 * 4 / 1e6, **options)
        first = [data[i] for i in range(6)]
        second = [data[i] for i in range(6)]
        for expected, one, again in zip(fresh, first, second, strict=True):
            assert torch.equal(expected.image, one.image) and torch.equal(expected.image, again.image)
            assert expected.text == one.text == again.text
        kept = [one.image is again.image for one, again in zip(first, second, strict=True)]
        assert kept == [True] * 4 + [False] * 2

    def test_image_and_text_show_the_scene_in_the_style_that_is_named(self) -> None:
        data = toy_images("val", 40, image_size=32, styles=("oil", "sketch"), style_patterns=PATTERNS)
        for i in range(len(data)):
            sample = data[i]
            (style,) = (name for name in STYLES if STYLES[name] in sample.text)
            expected = torch.from_numpy(render(data.scene(i), 32, style)).permute(2, 0, 1)
            assert sample.image.dtype == torch.uint8 and torch.equal(sample.image, expected)
            assert sorted(parse_caption(sample.text)) == sorted(thing.spec for thing in data.scene(i).objects)

    def test_patterns_name_the_style_in_the_language_of_the_caption(self) -> None:
        chinese = toy_images("train", 60, styles=("oil", "ink"), style_patterns=PATTERNS)
        texts = [chinese.text(i) for i in range(60)]
        assert all(text.endswith("图像") or "风格的" in text for text in texts)
        assert 15 < sum(text.endswith("图像") for text in texts) < 45
        english = toy_images("train", 9, language="en", styles=("oil",), style_patterns=("{text}, {style}",))
        assert {english.text(i).rpartition(", ")[2] for i in range(9)} == {"oil painting"}

    def test_without_patterns_styles_are_drawn_evenly_and_not_named(self) -> None:
        data = toy_images("train", 1500, styles=("flat", "oil", "ink"))
        counts = Counter(data.style(i) for i in range(1500))
        assert all(430 < counts[style] < 570 for style in ("flat", "oil", "ink"))
        plain = toy_images("train", 1500)
        assert all(data.text(i) == plain.text(i) and data.scene(i) == plain.scene(i) for i in range(100))

    @pytest.mark.parametrize("number", [2, 3, 5])
    def test_styles_meet_the_pairs_held_out_from_them_in_validation_only(self, number: int) -> None:
        styles = tuple(STYLES)[:number]
        held_out = {(*pair, style) for pair, style in styles_held_out(styles).items()}
        train = toy_images("train", 1000, styles=styles, style_patterns=PATTERNS)
        seen, sizes = Counter(), Counter()
        for i in range(1000):
            style, scene = train.style(i), train.scene(i)
            sizes[len(scene.objects)] += 1
            seen.update({(thing.colour, thing.shape, style) for thing in scene.objects})
            assert not {(thing.colour, thing.shape, thing.place) for thing in scene.objects} & HELD_OUT
            assert STYLES[style] in train.text(i)
        assert not set(seen) & held_out
        # Every colour and every shape with every style, and every pair.
        assert len({(colour, style) for colour, _, style in seen}) == len(COLOURS) * number
        assert len({(shape, style) for _, shape, style in seen}) == len(SHAPES) * number
        assert len({(colour, shape) for colour, shape, _ in seen}) == len(COLOURS) * len(SHAPES)
        # Scenes that no style may show are redrawn, not thinned out.
        assert [sizes[n] / 1000 for n in (1, 2, 3)] == pytest.approx([0.5, 0.35, 0.15], abs=0.05)
        val = toy_images("val", 300, styles=styles, style_patterns=PATTERNS)
        for i in range(300):
            first = val.scene(i).objects[0]
            assert (first.colour, first.shape, val.style(i)) in held_out
        assert {val.style(i) for i in range(300)} == set(styles)

    def test_held_out_styles_are_spread_evenly_and_fixed_for_ever(self) -> None:
        for number in (2, 3, 4, 5):
            kept = styles_held_out(tuple(STYLES)[:number])
            assert kept == styles_held_out(reversed(tuple(STYLES)[:number]))
            counts = Counter(kept.values())
            assert len(kept) == 48 and len(counts) == number
            assert max(counts.values()) - min(counts.values()) <= 1
        # Figures of old and new runs stay comparable.
        assert styles_held_out(STYLES)["red", "circle"] == "cartoon"

    def test_ends(self) -> None:
        with pytest.raises(IndexError):
            toy_images("train", 3)[3]

    @pytest.mark.parametrize(
        "bad",
        [
            {"split": "test"}, {"size": 0}, {"seed": -1}, {"image_size": 0}, {"language": "fr"},
            {"styles": ()}, {"styles": ("cubism",)}, {"object_probabilities": (0, 0)},
            {"style_patterns": ("{style}",)},
        ],
        ids=lambda bad: next(iter(bad)),
    )  # fmt: skip
    def test_bad_arguments_are_named(self, bad: dict[str, object]) -> None:
        with pytest.raises(UserError, match=next(iter(bad))):
            toy_images(**{"split": "train", "size": 10, **bad})  # type: ignore[arg-type]
