"""The toy world: what is drawn is what is named, the judge reads it back, held-out combinations stay out."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from cogview_pl.errors import UserError
from cogview_pl.toy_world.captions import STYLES, caption, parse_caption, style_name
from cogview_pl.toy_world.dataset import ToyDataset
from cogview_pl.toy_world.judge import Detected, Judge, score, score_detected
from cogview_pl.toy_world.render import BACKGROUND, PALETTE, render
from cogview_pl.toy_world.scene import (
    COLOURS,
    HELD_OUT,
    PLACES,
    SHAPES,
    Object,
    Scene,
    random_stream,
    sample_scene,
)

from .toy_images import toy_images

ONE_RED_CIRCLE = Scene((Object("red", "circle", "big", "left", x=1 / 6, y=0.5, radius=0.145),), texture_seed=3)


def triples(scene: Scene) -> set[tuple[str, str, str]]:
    return {(thing.colour, thing.shape, thing.place) for thing in scene.objects}


class TestScene:
    def test_is_fixed_for_ever_by_seed_split_and_index(self) -> None:
        # Figures of old and new runs stay comparable, on any platform.
        scene = sample_scene(0, "train", 12345)
        expected = (("red", "circle", "small", "left"), ("yellow", "square", "big", "bottom"))
        assert tuple(thing.spec for thing in scene.objects) == expected
        assert scene.texture_seed == 791479309
        assert sample_scene(0, "train", 12345) == scene

    def test_survives_json(self) -> None:
        scene = sample_scene(0, "train", 1)
        fields = json.loads(json.dumps(scene.to_dict()))
        objects = tuple(Object(**thing) for thing in fields["objects"])
        assert Scene(objects, fields["texture_seed"]) == scene

    def test_seed_split_and_index_all_matter(self) -> None:
        scenes = {sample_scene(*arguments) for arguments in ((0, "train", 7), (1, "train", 7), (0, "train", 8))}
        assert len(scenes | {sample_scene(0, "val", 7)}) == 4

    def test_held_out_combinations_never_meet_training(self) -> None:
        for index in range(3000):
            assert not triples(sample_scene(0, "train", index)) & HELD_OUT
            assert triples(sample_scene(0, "val", index)) <= HELD_OUT

    def test_each_pair_of_attributes_is_trained_and_each_attribute_validated(self) -> None:
        assert 0.11 < len(HELD_OUT) / (len(COLOURS) * len(SHAPES) * len(PLACES)) < 0.13
        trained = {(c, s, p) for c in COLOURS for s in SHAPES for p in PLACES} - HELD_OUT
        for first, second, number in ((0, 1, 48), (0, 2, 72), (1, 2, 54)):
            assert len({(triple[first], triple[second]) for triple in trained}) == number
        for kind, values in enumerate((COLOURS, SHAPES, PLACES)):
            assert {triple[kind] for triple in HELD_OUT} == set(values)

    def test_objects_lie_in_their_own_cells(self) -> None:
        for index in range(500):
            objects = sample_scene(2, "train", index).objects
            assert len({thing.place for thing in objects}) == len(objects)
            for thing in objects:
                assert PLACES[3 * int(3 * thing.y) + int(3 * thing.x)] == thing.place
                assert thing.radius < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) + 1e-9

    def test_number_of_objects_follows_the_probabilities(self) -> None:
        numbers = Counter(len(sample_scene(0, "train", index).objects) for index in range(3000))
        assert [numbers[n] / 3000 for n in (1, 2, 3)] == pytest.approx([0.5, 0.35, 0.15], abs=0.03)
        assert {len(sample_scene(0, "val", index, (0, 0, 1)).objects) for index in range(100)} == {3}

    @pytest.mark.parametrize(
        ("seed", "split", "probabilities", "named"),
        [
            (0, "test", (1.0,), "split"),
            (-1, "val", (1.0,), "seed"),
            (0, "val", (), "object_probabilities"),
            (0, "val", (0, 0, 0), "object_probabilities"),
            (0, "val", (1, -1), "object_probabilities"),
            (0, "val", (1, 1, 1, 1), "object_probabilities"),
        ],
    )
    def test_bad_arguments_are_named(self, seed: int, split: str, probabilities: Sequence[float], named: str) -> None:
        with pytest.raises(UserError, match=named):
            sample_scene(seed, split, 0, probabilities)


class TestCaption:
    @pytest.mark.parametrize("language", ["zh", "en"])
    def test_parses_back_to_the_scene(self, language: str) -> None:
        for index in range(1000):
            scene = sample_scene(5, "train", index)
            text = caption(scene, language, random_stream(index))
            for styled in (text, *(f"{text} {style_name(style, language)} {text}" for style in STYLES)):
                assert set(parse_caption(styled)) == {thing.spec for thing in scene.objects}, styled

    def test_reads_as_expected(self) -> None:
        texts = {caption(ONE_RED_CIRCLE, "zh", random_stream(index)) for index in range(200)}
        assert "左边有一个大的红色圆形" in texts
        assert len(texts) >= 6
        assert "a big red circle on the left" in {
            caption(ONE_RED_CIRCLE, "en", random_stream(index)) for index in range(200)
        }

    def test_chinese_is_short_and_shuffles_the_objects(self) -> None:
        scene = sample_scene(0, "train", 0, (0, 0, 1))
        texts = [caption(scene, "zh", random_stream(index)) for index in range(300)]
        assert max(map(len, texts)) <= 48
        assert len({parse_caption(text) for text in texts}) == math.factorial(3)

    def test_is_read_whatever_its_case(self) -> None:
        assert parse_caption("A big RED circle On The Left") == (ONE_RED_CIRCLE.objects[0].spec,)

    @pytest.mark.parametrize(
        "text", ["", "一只猫", "a walk across town", "一个红色的圆形", "左边有一个大的红色圆形和一个心形"]
    )
    def test_prompts_without_whole_objects_are_refused(self, text: str) -> None:
        with pytest.raises(UserError, match="prompt"):
            parse_caption(text)

    def test_an_unknown_language_is_named(self) -> None:
        with pytest.raises(UserError, match="language: found 'fr'"):
            caption(ONE_RED_CIRCLE, "fr", random_stream(0))


class TestDraw:
    @pytest.mark.parametrize(
        ("shape", "area"),
        [
            ("circle", math.pi * 0.94**2),
            ("square", 1.64**2),
            ("triangle", 3 * math.sqrt(3) / 4 * 1.1**2),
            ("star", 5 * 1.08 * 0.47 * math.sin(math.pi / 5)),
            ("cross", 2 * 1.96 * 0.7 - 0.7**2),
            ("heart", 1.2**2 + math.pi * 0.6**2),
        ],
    )
    @pytest.mark.parametrize("resolution", [64, 256])
    def test_shapes_have_their_areas(self, shape: str, area: float, resolution: int) -> None:
        thing = Object("black", shape, "big", "middle", x=0.503, y=0.498, radius=0.145)
        image = render(Scene((thing,), texture_seed=0), resolution).astype(float)
        empty, full = np.array(BACKGROUND), np.array(PALETTE["black"])
        covered = ((image - empty) / (full - empty)).mean()
        assert covered == pytest.approx(area * 0.145**2, rel=0.02)

    def test_flat_pixels_have_the_palette_s_colours(self) -> None:
        image = render(ONE_RED_CIRCLE, 64)
        assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
        assert tuple(image[32, 11]) == PALETTE["red"]
        assert (image[:, 24:] == BACKGROUND).all()

    @pytest.mark.parametrize("style", STYLES)
    def test_is_deterministic_and_agrees_across_resolutions(self, style: str) -> None:
        for index in range(10):
            scene = sample_scene(1, "train", index)
            fine = render(scene, 128, style)
            assert (fine == render(scene, 128, style)).all()
            coarse = fine.reshape(64, 2, 64, 2, 3).mean((1, 3))
            assert np.abs(coarse - render(scene, 64, style)).mean() < 3

    def test_styles_differ_and_noise_is_the_scene_s_own(self) -> None:
        images = {style: render(ONE_RED_CIRCLE, 64, style).tobytes() for style in STYLES}
        assert len(set(images.values())) == len(STYLES)
        again = Scene(ONE_RED_CIRCLE.objects, texture_seed=4)
        changed = {style for style in STYLES if render(again, 64, style).tobytes() != images[style]}
        assert changed == {"oil", "sketch", "ink"}

    def test_unknown_style_is_named(self) -> None:
        with pytest.raises(UserError, match="'cubism'"):
            render(ONE_RED_CIRCLE, 64, "cubism")


def stacked(data: ToyDataset) -> torch.Tensor:
    return torch.stack([data[i].image for i in range(len(data))])


def images_of(style: str, number: int) -> tuple[list[Scene], torch.Tensor]:
    data = toy_images("train", number, seed=9, styles=(style,))
    return [data.scene(i) for i in range(number)], stacked(data)


@pytest.fixture(scope="module")
def flat_images() -> tuple[list[Scene], torch.Tensor]:
    return images_of("flat", 3000)


def degraded(images: torch.Tensor) -> torch.Tensor:
    """Blurred with sigma 0.8 pixels, noise with deviation 0.03, float."""
    pixels = torch.arange(images.shape[-1])
    weights = torch.exp(-((pixels[:, None] - pixels) ** 2) / (2 * 0.8**2))
    weights = weights / weights.sum(1, keepdim=True)
    blurred = weights @ (images / 255) @ weights.T
    return blurred + 0.03 * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(0))


def share_right(scenes: Sequence[Scene], found: Sequence[Sequence[Detected]]) -> dict[str, float]:
    """Shares of images with the right number, and of objects with an attribute right in the right place."""
    right = {"number": [len(s.objects) == len(f) for s, f in zip(scenes, found, strict=True)]}
    for kind in ("place", "colour", "shape", "size"):
        right[kind] = [
            any(one.place == thing.place and getattr(one, kind) == getattr(thing, kind) for one in detected)
            for scene, detected in zip(scenes, found, strict=True)
            for thing in scene.objects
        ]
    return {kind: sum(values) / len(values) for kind, values in right.items()}


class TestJudge:
    def test_reads_flat_drawings(self, flat_images: tuple[list[Scene], torch.Tensor]) -> None:
        scenes, images = flat_images
        assert min(share_right(scenes, Judge(64)(images)).values()) >= 0.999

    @pytest.mark.slow
    def test_reads_blurred_and_noisy_drawings(self, flat_images: tuple[list[Scene], torch.Tensor]) -> None:
        scenes, images = flat_images
        assert min(share_right(scenes, Judge(64)(degraded(images))).values()) >= 0.995

    @pytest.mark.parametrize("style", [style for style in STYLES if style != "flat"])
    def test_reads_other_styles(self, style: str) -> None:
        scenes, images = images_of(style, 250)
        assert min(share_right(scenes, Judge(64)(images)).values()) >= 0.98
        assert min(share_right(scenes, Judge(64)(degraded(images))).values()) >= 0.97

    @pytest.mark.parametrize("resolution", [48, 128])
    def test_reads_other_resolutions(self, resolution: int) -> None:
        data = toy_images("val", 100, image_size=resolution)
        found = Judge(resolution)(stacked(data))
        assert min(share_right([data.scene(i) for i in range(100)], found).values()) == 1

    def test_an_object_between_two_cells_is_one_object(self) -> None:
        thing = Object("green", "square", "big", "left", x=0.34, y=0.5, radius=0.145)
        (found,) = Judge(64)(render(Scene((thing,), texture_seed=0), 64).transpose(2, 0, 1)[None])
        assert [(one.colour, one.shape, one.place) for one in found] == [("green", "square", "middle")]

    def test_reads_a_faded_image(self) -> None:
        empty = torch.tensor(BACKGROUND).view(1, 3, 1, 1)
        faded = empty + 0.25 * (stacked(toy_images("train", 30)).float() - empty)
        for detected in Judge(64)(faded / 255):
            assert all(0.5 < one.confidence <= 1 for one in detected)

    def test_finds_nothing_where_there_is_nothing(self) -> None:
        empty = torch.full((1, 3, 64, 64), 0.97)
        assert Judge(64)(torch.cat([empty, torch.zeros(1, 3, 64, 64), empty * math.nan])) == [[], [], []]
        assert Judge(64)(empty[:0]) == []

    def test_refuses_other_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"\(B, 3, 64, 64\)"):
            Judge(64)(torch.zeros(1, 3, 32, 32))


def found_object(place: str, colour: str = "red", shape: str = "circle", confidence: float = 0.9) -> Detected:
    row, column = divmod(PLACES.index(place), 3)
    return Detected(colour, shape, "big", place, (column + 0.5) / 3, (row + 0.5) / 3, confidence)


class TestScore:
    def test_true_images_are_all_right_and_shuffled_prompts_are_not(self) -> None:
        data = toy_images("val", 300, language="en")
        images = stacked(data)
        prompts = [data.text(i) for i in range(len(data))]
        true = score(images, prompts)
        assert true.colour_accuracy == true.shape_accuracy == true.place_accuracy == true.size_accuracy == 1
        assert true.all_right == 1
        assert true.count == sum(len(data.scene(i).objects) for i in range(len(data)))
        shuffled = score(images, prompts[1:] + prompts[:1])
        assert shuffled.all_right < 0.03
        assert shuffled.colour_accuracy < 0.3
        assert shuffled.shape_accuracy < 0.35
        assert shuffled.place_accuracy < 0.35

    @pytest.mark.parametrize(
        ("detected", "colour", "shape", "place", "all_right"),
        [
            ([found_object("left")], 1, 1, 1, 1),
            ([found_object("left", colour="blue")], 0, 1, 1, 0),
            ([found_object("right")], 1, 1, 0, 0),
            ([found_object("left"), found_object("right")], 1, 1, 1, 0),
            ([found_object("right", shape="heart"), found_object("top_left")], 1, 1, 0, 0),
            ([found_object("left", confidence=0.5), found_object("left", "blue")], 0, 1, 1, 0),
            ([], 0, 0, 0, 0),
        ],
        ids=["right", "wrong colour", "elsewhere", "one too many", "nearest", "surest", "nothing"],
    )
    def test_one_named_object(
        self, detected: list[Detected], colour: int, shape: int, place: int, all_right: int
    ) -> None:
        figures = score_detected([detected], ["a big red circle on the left"])
        assert figures.colour_accuracy == colour
        assert figures.shape_accuracy == shape
        assert figures.place_accuracy == place
        assert figures.all_right == all_right

    def test_an_object_is_judged_once(self) -> None:
        prompt = "a big red circle on the left and a big red circle on the right"
        assert score_detected([[found_object("left")]], [prompt]).colour_accuracy == 0.5
        assert score_detected([[found_object("top")]], [prompt]).colour_accuracy == 0.5

    def test_refuses_what_it_cannot_score(self) -> None:
        with pytest.raises(UserError, match="names no object"):
            score(torch.zeros(1, 3, 64, 64), ["a cat"])
        with pytest.raises(UserError, match="no images"):
            score_detected([], [])
