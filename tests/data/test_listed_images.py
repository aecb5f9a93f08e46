"""Images of a folder in columns: they are those that were put in, and take little memory."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np

from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.image_folders.listed import Listed, Span
from cogview_pl.data.image_folders.listed_images import ListedImages
from cogview_pl.data.packed import is_among

from .image_folders import folder


def test_images_come_back_as_they_were_put_in() -> None:
    random_ = random.Random(0)
    texts = ["", "猫", "a" * 5000, "\udcff.png", "😀", "x"]
    images = [
        Listed(
            random_.choice(texts),
            tuple(random_.choices(texts, k=random_.randrange(4))),
            {"zh": random_.choice(texts), "en": random_.choice(texts)},
            random_.choice(("油画", "素描", "")),
            random_.choice(("", "", "no caption")),
            random_.choice((None, Span("a.tsv", number, 2**33), Span("b.tsv", 2**40, number))),
        )
        for number in range(300)
    ]
    for some in (images, [one._replace(span=None) for one in images], []):
        packed = ListedImages(some)
        assert list(packed) == some and packed[1:7] == some[1:7] and packed[-3:] == some[-3:]
        assert packed.num_captions().tolist() == [len(one.captions) for one in some]
        assert list(pickle.loads(pickle.dumps(packed))) == some
        packed.rename(lambda file: f"folder/{file}")
        assert [one.file for one in packed] == [one.file if one.problem else f"folder/{one.file}" for one in some]


def test_a_field_may_come_late() -> None:
    packed = ListedImages([Listed("a", ("x",)), Listed("b", others={"zh": "猫"}), Listed("c")])
    assert [one.others for one in packed] == [{"zh": ""}, {"zh": "猫"}, {"zh": ""}]


def test_is_among() -> None:
    assert is_among(["a", "猫", "\udcff", "a"], ["猫", "b", "\udcff"]).tolist() == [False, True, True, False]
    assert is_among([], ["a"]).tolist() == [] and is_among(["a"], []).tolist() == [False]


def test_images_take_little_more_memory_than_their_names_and_texts(tmp_path: Path) -> None:
    """Also a validation split: it does not hold the images of the training split. Workers are sent no more."""
    lines = [f'{{"file_name": "{number:09}.png", "text": "第{number:06}张"}}' for number in range(5000)]
    folder(tmp_path, ["000000001.png"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    splits = [FolderDataset(tmp_path, split, 8, 0.1) for split in ("train", "val")]
    named = len("000000000.png" + "第000000张".encode().decode("latin-1"))
    for dataset in splits:
        assert len(pickle.dumps(dataset)) / len(dataset) < named + 50
    assert sorted(int(dataset.text(index)[1:-1]) for dataset in splits for index in range(len(dataset))) == list(
        np.arange(5000)
    )
