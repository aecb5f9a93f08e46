"""What the judge of the toy world reads is fixed for ever, so that figures stay comparable, and scores are counted."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from cogview_pl.errors import UserError
from cogview_pl.toy_world.captions import STYLES
from cogview_pl.toy_world.judge import Detected, Judge, ToyScore, score, score_captions, score_detected
from cogview_pl.toy_world.scene import PLACES, cell_centre, random_stream

from .toy_images import toy_images

RECORDED = {
    "flat": """
        red heart big top_right 0.8373 0.1365 0.9940
        green triangle big bottom_right 0.8351 0.8602 0.9929
        black circle small bottom_left 0.1581 0.8412 0.9978""",
    "oil": """
        red heart big top_right 0.8385 0.1406 0.9883
        green triangle big bottom_right 0.8351 0.8616 0.9818
        black circle small bottom_left 0.1585 0.8431 0.9844""",
    "sketch": """
        red heart big top_right 0.8358 0.1340 0.9655
        green triangle big bottom_right 0.8362 0.8582 0.9766
        black circle small bottom_left 0.1601 0.8392 0.9834""",
    "cartoon": """
        red heart big top_right 0.8361 0.1362 0.9820
        green triangle big bottom_right 0.8350 0.8559 0.9821
        black circle small bottom_left 0.1578 0.8414 0.9843""",
    "ink": """
        red heart big top_right 0.8267 0.1404 0.9585
        black circle small bottom_left 0.1584 0.8358 0.9793
        green triangle big bottom_right 0.8308 0.8523 0.9709""",
    "16x16 random blocks": """
        pink square big right 0.8763 0.5772 0.8058
        pink square big top_right 0.8720 0.2742 0.9173
        pink heart small top_right 0.8690 0.0679 0.8165
        purple square big bottom_right 0.8843 0.8909 0.8967
        green triangle small left 0.0480 0.5785 0.7061
        orange circle big left 0.2391 0.4596 0.5433
        pink circle big bottom 0.5529 0.8863 0.7671
        pink square big top_left 0.1073 0.1283 0.8335
        purple heart big top 0.4447 0.1204 0.7140
        pink heart big bottom_left 0.2371 0.8169 0.7230
        yellow triangle small bottom_left 0.0555 0.9255 0.7737""",
    "8x8 random blocks": """
        pink circle big left 0.1158 0.5080 0.6377
        pink square big top_left 0.1183 0.1127 0.8910
        green square big bottom_right 0.8848 0.7438 0.7439
        blue circle big bottom_left 0.2001 0.8780 0.7563
        red heart big top 0.5143 0.0843 0.6936
        blue square big right 0.8872 0.3438 0.6708
        purple heart big middle 0.5123 0.3931 0.4141
        blue circle big bottom 0.5602 0.8872 0.7115""",
}
"""Colour, shape, size, place, x, y and confidence, as the first version of the judge read them."""

EMPTY = torch.full((3, 64, 64), 0.97)


def blocks(seed: int, number: int) -> torch.Tensor:
    """Squares of random colours: what a bad model draws."""
    colours = random_stream(seed).random((number, number, 3)).astype(np.float32)
    return (
        torch.from_numpy(colours).permute(2, 0, 1).repeat_interleave(64 // number, 1).repeat_interleave(64 // number, 2)
    )


def image_of(name: str) -> torch.Tensor:
    """Float, of 64 pixels: one of `RECORDED`."""
    if name.endswith("blocks"):
        return {"16x16": blocks(1, 16), "8x8": blocks(2, 8)}[name.split()[0]]
    data = toy_images("train", 60, seed=5, styles=(name,))
    index = next(i for i in range(60) if len(data.scene(i).objects) == 3)
    return data[index].image.float() / 255


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(64)


def assert_recorded(found: list[Detected], name: str) -> None:
    rows = [line.split() for line in RECORDED[name].split("\n") if line]
    assert [list(one[:4]) for one in found] == [row[:4] for row in rows], name
    assert np.allclose([one[4:] for one in found], [[float(x) for x in row[4:]] for row in rows], atol=2e-4), name


def test_what_is_read_is_fixed_for_ever(judge: Judge) -> None:
    assert {*STYLES} < {*RECORDED}
    found = judge(torch.stack([image_of(name) for name in RECORDED]))
    for one, name in zip(found, RECORDED, strict=True):
        assert_recorded(one, name)


def test_bytes_arrays_and_other_resolutions_are_read_alike(judge: Judge) -> None:
    image = image_of("flat")[None]
    wanted = judge(image)
    assert judge(image.numpy()) == judge((image * 255).round().to(torch.uint8)) == wanted
    assert judge(image.double()) == wanted
    found = Judge(256)(image.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert [one[:4] for one in found[0]] == [one[:4] for one in wanted[0]]
    assert np.allclose([one[4:] for one in found[0]], [one[4:] for one in wanted[0]], atol=0.005)


def test_pixels_beyond_black_and_white_count_as_these(judge: Judge) -> None:
    image = 0.5 + 3 * (image_of("cartoon")[None] - 0.5)
    assert image.min() < 0 and image.max() > 1
    assert judge(image) == judge(image.clamp(0, 1)) != judge(image_of("cartoon")[None])


def test_many_images_are_read_as_each_alone(judge: Judge) -> None:
    many = EMPTY.repeat(131, 1, 1, 1)
    for place, name in ((0, "flat"), (127, "oil"), (128, "8x8 random blocks"), (130, "ink")):
        many[place] = image_of(name)
    found = judge(many)
    assert len(found) == 131
    assert [i for i, one in enumerate(found) if one] == [0, 127, 128, 130]
    for place, name in ((0, "flat"), (127, "oil"), (128, "8x8 random blocks"), (130, "ink")):
        assert_recorded(found[place], name)


def test_nothing_is_found_in_nothing(judge: Judge) -> None:
    assert judge(torch.stack([EMPTY, torch.zeros(3, 64, 64), EMPTY * math.nan])) == [[], [], []]
    assert judge(torch.zeros(0, 3, 64, 64)) == []


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 1, 64, 64), (1, 3, 64, 32), (3, 64, 64)])
def test_other_shapes_are_refused(judge: Judge, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"found shape \(.*\), expected \(B, 3, 64, 64\)"):
        judge(torch.zeros(shape))


def specks(*corners: tuple[int, int], edge: int) -> torch.Tensor:
    """Black squares on white."""
    image = torch.ones(1, 3, 64, 64)
    for y, x in corners:
        image[:, :, y : y + edge, x : x + edge] = 0
    return image


def test_specks_are_no_objects(judge: Judge) -> None:
    assert judge(specks((30, 30), edge=2)) == [[]]
    (found,) = judge(specks((30, 40), edge=6))
    assert [(one.colour, one.place) for one in found] == [("black", "right")]
    assert (found[0].y, found[0].x) == pytest.approx((33 / 64, 43 / 64), abs=1e-4)


def test_twelve_objects_are_looked_at(judge: Judge) -> None:
    corners = list(itertools.product(range(5, 64, 16), repeat=2))
    for number in (11, 12, 16):
        assert len(judge(specks(*corners[:number], edge=6))[0]) == min(12, number)


def test_blobs_near_one_another_are_one(judge: Judge) -> None:
    for turned in (False, True):
        found = []
        for apart in (9, 10, 11, 12):
            image = torch.ones(1, 3, 64, 64)
            for x in (20, 20 + apart):  # two bars
                image[:, :, 20:30, x : x + 2] = 0
            found.append(len(judge(image.transpose(2, 3) if turned else image)[0]))
        assert found == [1, 1, 2, 2]


# --- scores


def seen(place: str, colour: str = "red", shape: str = "circle", size: str = "big", sure: float = 0.9) -> Detected:
    return Detected(colour, shape, size, place, *cell_centre(place), sure)


def test_each_attribute_is_counted_on_its_own() -> None:
    prompts = [
        "a big red circle on the left and a small blue heart at the top",
        "a big green star in the middle",
        "a small black cross at the bottom and a big red circle in the top left corner",
    ]
    found = [
        [seen("left", size="small"), seen("right", "blue", "star", "small")],
        [seen("middle", "green", "star")],
        [seen("top_left", "pink")],
    ]
    # Of five objects, the first has another size, the second another shape and place, the fourth is not there, the
    # last has another colour.
    expected = ToyScore(3 / 5, 3 / 5, 3 / 5, 3 / 5, all_right=1 / 3, count=5)
    assert score_detected(found, prompts) == expected
    found[2] = [seen("top_left", "pink"), seen("top", "black", "star", "small"), seen("bottom_left", "blue", "star")]
    figures = score_detected(found, prompts)  # the lower one of the two is judged: all wrong as before
    assert figures == expected
    found[2] = found[2][:2]
    assert score_detected(found, prompts) == ToyScore(4 / 5, 3 / 5, 3 / 5, 4 / 5, all_right=1 / 3, count=5)


def test_the_nearest_free_object_is_judged_for_one_that_is_elsewhere() -> None:
    for named, near, far in itertools.permutations(PLACES, 3):
        distances = [math.dist(cell_centre(named), cell_centre(place)) for place in (near, far)]
        if distances[0] < distances[1] - 1e-6:
            prompt = f"a big red circle {PHRASES[named]}"
            for pair in ([seen(near), seen(far, "blue")], [seen(far, "blue"), seen(near)]):
                figures = score_detected([pair], [prompt])
                assert (figures.colour_accuracy, figures.place_accuracy) == (1, 0), (named, near, far)


PHRASES = {
    place: ("at the " if place in ("top", "bottom") else "on the " if place in ("left", "right") else "in the ")
    + place.replace("_", " ")
    + (" corner" if "_" in place else "")
    for place in PLACES
}


def test_an_object_is_judged_once_and_the_surest_one_of_a_cell() -> None:
    prompt = "a big red circle on the left and a big red circle on the right"
    for alone in ("left", "top"):  # in a cell that is named, or free
        figures = score_detected([[seen(alone)]], [prompt])
        assert figures.colour_accuracy == figures.shape_accuracy == figures.size_accuracy == 0.5
        assert figures.place_accuracy == (0.5 if alone == "left" else 0)
    for pair in itertools.permutations([seen("left", sure=0.5), seen("left", "blue", sure=0.6)]):
        assert score_detected([pair], ["a big red circle on the left"]).colour_accuracy == 0
    both = [seen("left"), seen("right")]
    assert score_detected([both], [prompt]).all_right == 1
    assert score_detected([[*both, seen("top")]], [prompt]).all_right == 0  # one more than named


def test_images_are_judged_at_their_own_resolution() -> None:
    data = toy_images("val", 6, image_size=96, language="en")
    images, prompts = torch.stack([data[i].image for i in range(6)]), [data.text(i) for i in range(6)]
    count = sum(len(data.scene(i).objects) for i in range(6))
    assert score(images, prompts) == ToyScore(1, 1, 1, 1, 1, count)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        score(images, prompts[:5])
    with pytest.raises(UserError, match=r"^score: found no images; give at least one image and its prompt$"):
        score(images[:0], [])


def test_captions_are_scored_like_images_at_the_middle_of_their_cells() -> None:
    truth = ["a big red circle on the left", "a small blue heart at the top"]
    found = ["a big red circle at the bottom and a big blue circle on the right", "the heart"]
    # The lower left of the two is the nearest to the left; the second caption names no whole object.
    assert score_captions(found, truth) == ToyScore(0.5, 0.5, 0, 0.5, 0, 2)
    assert score_captions(truth, truth) == ToyScore(1, 1, 1, 1, 1, 2)
