"""Crops, flips and views: images of the right pixels, the same whenever they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from cogview_pl.assembly.image_data import open_images
from cogview_pl.data.config import Captions, Crop, Decoding, FolderDataConfig
from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.loader import suitable_workers
from cogview_pl.data.samples import CaptionedImages, Skipped
from cogview_pl.errors import UserError

EDGE = 8


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """40 images, red on the left and brighter downwards, twice as wide as high; one of them is damaged."""
    for number in range(40):
        image = Image.new("RGB", (32, 16), (250, 0, 0))
        image.paste((0, 0, 250), (16, 0, 32, 16))
        image.save(tmp_path / f"{number:02}.png")
        (tmp_path / f"{number:02}.txt").write_text(f"第{number}张")
    (tmp_path / "39.png").write_bytes(b"damaged")
    return tmp_path


def opened(root: Path, split: str = "train", val_fraction: float = 0.0, **options: object) -> CaptionedImages:
    data = FolderDataConfig(
        _target_="cogview_pl.data.folder.FolderDataset", image_size=EDGE, batch_size=8, num_workers=0,
        worker_timeout=None, max_val_samples=None, max_skipped_share=1.0, root=str(root), val_fraction=val_fraction,
        min_size=0,
        style_patterns=[], captions=Captions.first, caption_seed=0, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return open_images(data, split)


def pixels(images: CaptionedImages) -> list[torch.Tensor]:
    return [sample.image for sample in images if not isinstance(sample, Skipped)]  # type: ignore[attr-defined]


def blue_columns(image: torch.Tensor) -> list[bool]:
    return (image[2].float().mean(0) > 125).tolist()


def test_random_crops_and_flips_follow_from_seed_and_key(root: Path) -> None:
    chosen = {"crop": Crop.random, "flip": True, "views": 3}
    images = opened(root, **chosen, view_seed=1)
    assert len(images) == 120
    assert [images.key(index) for index in (0, 1, 2, 3, 119)] == [
        "00.png",
        "00.png#2",
        "00.png#3",
        "01.png",
        "39.png#3",
    ]
    assert [images[index].key for index in (2, 119)] == ["00.png#3", "39.png#3"]
    assert [images.text(index) for index in (0, 2, 3)] == ["第0张", "第0张", "第1张"]
    first = pixels(images)
    assert len(first) == 117
    assert len({tuple(blue_columns(image)) for image in first}) > 9  # 9 places, mirrored or not
    again = pixels(opened(root, **chosen, view_seed=1))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other_seed = pixels(opened(root, **chosen, view_seed=2))
    assert not all(torch.equal(one, other) for one, other in zip(first, other_seed, strict=True))
    for number in range(30):
        (root / f"{number:02}.png").unlink()
        (root / f"{number:02}.txt").unlink()
    fewer = pixels(opened(root, **chosen, view_seed=1))
    assert all(torch.equal(one, other) for one, other in zip(first[-27:], fewer, strict=True))


def test_flips_mirror_half_of_the_views(root: Path) -> None:
    mirrored = [blue_columns(image)[0] for image in pixels(opened(root, flip=True, views=10))]
    assert 0.4 < sum(mirrored) / len(mirrored) < 0.6
    assert not any(blue_columns(image)[0] for image in pixels(opened(root)))


def test_padding_shows_all_of_the_image_on_white(root: Path) -> None:
    for image in pixels(opened(root, crop=Crop.pad)):
        assert (image[:, :2] == 255).all() and (image[:, 6:] == 255).all()
        assert image[:, 2:6, 1].float().mean(1).round().tolist() == [250, 0, 0]
        assert image[:, 2:6, 6].float().mean(1).round().tolist() == [0, 0, 250]
    Image.new("RGB", (15, 30)).save(root / "00.png")
    tall = pixels(opened(root, crop=Crop.pad))[0]
    assert (tall[:, :, :2] == 255).all() and (tall[:, :, 6:] == 255).all() and (tall[:, :, 2:6] == 0).all()


def test_validation_images_are_seen_once_in_the_centre(root: Path) -> None:
    chosen = {"crop": Crop.random, "flip": True, "views": 3, "val_fraction": 0.5}
    plain, chance = opened(root, "val", val_fraction=0.5), opened(root, "val", **chosen)
    assert len(plain) == len(chance)
    assert plain.fingerprint() == chance.fingerprint()
    assert all(torch.equal(one, other) for one, other in zip(pixels(plain), pixels(chance), strict=True))


def test_a_fingerprint_tells_views_apart_and_stays_without_them(root: Path) -> None:
    plain = FolderDataset(root, "train", EDGE, 0).fingerprint()
    assert opened(root).fingerprint() == opened(root, view_seed=7).fingerprint() == plain
    changed = [
        {"crop": Crop.pad}, {"crop": Crop.random}, {"crop": Crop.random, "view_seed": 1}, {"flip": True},
        {"flip": True, "views": 2}, {"max_pixels": 10**6}, {"zoom": 2.0},
    ]  # fmt: skip
    assert len({plain, *(opened(root, **options).fingerprint() for options in changed)}) == 8
    assert Decoding().changes() == ()


def test_views_that_would_be_the_same_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.views=2: all would be the same; set data\.crop=random or data\.flip"):
        opened(root, views=2, crop=Crop.pad)


def test_zoom_leaves_validation_as_it_is(root: Path) -> None:
    plain, zoomed = (opened(root, "val", val_fraction=0.5, zoom=zoom) for zoom in (1.0, 2.0))
    assert all(torch.equal(one, other) for one, other in zip(pixels(plain), pixels(zoomed), strict=True))


def test_every_view_of_a_bad_sample_is_known(root: Path) -> None:
    (root / "03.txt").write_text("")
    bad = [sample.key for sample in opened(root, flip=True, views=2).known_bad()]
    assert bad == ["03.png", "03.png#2"]


def test_the_number_of_loader_processes_suits_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processes, wanted in ((1, 1, 0), (2, 1, 1), (8, 2, 3), (64, 2, 8), (4, 8, 0)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert suitable_workers(None, 10_000, processes) == wanted
    assert suitable_workers(None, 100, 1) == suitable_workers(None, 0, 1) == 0  # few images, rows of a token store
    assert suitable_workers(3, 0, 1) == 3
