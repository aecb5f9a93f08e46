"""Captions are compared object by object."""

from cogview_pl.toy_world.judge import score_captions

TRUTH = "左上角有一个大的红色圆形，右下角有一个小的蓝色心形"


def test_right_caption() -> None:
    score = score_captions(["右下角是一个小的蓝色心形，一个大的红色圆形在左上角"], [TRUTH])
    assert score.colour_accuracy == score.shape_accuracy == score.place_accuracy == score.all_right == 1.0


def test_one_wrong_attribute() -> None:
    score = score_captions(["左上角有一个大的红色方形，右下角有一个小的绿色心形".replace("方形", "正方形")], [TRUTH])
    assert (score.colour_accuracy, score.shape_accuracy, score.size_accuracy, score.all_right) == (0.5, 0.5, 1.0, 0.0)


def test_missing_object_and_nonsense_count_as_wrong() -> None:
    score = score_captions(["左上角有一个大的红色圆形", "天地玄黄"], [TRUTH, TRUTH])
    assert score.colour_accuracy == score.place_accuracy == 0.25
    assert score.all_right == 0.0


def test_wrong_place_costs_the_place_alone() -> None:
    score = score_captions(["左边有一个大的红色圆形，右下角有一个小的蓝色心形"], [TRUTH])
    assert (score.colour_accuracy, score.shape_accuracy, score.size_accuracy) == (1.0, 1.0, 1.0)
    assert (score.place_accuracy, score.all_right) == (0.5, 0.0)
