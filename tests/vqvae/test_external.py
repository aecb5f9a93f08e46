"""Image tokenizers of other projects: what the protocol refuses, and model folders of a class that a run names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogview_pl.checkpoints.model_folder import ImageTokenizer, load_image_tokenizer, save_image_tokenizer
from cogview_pl.errors import UserError
from cogview_pl.vqvae import external
from cogview_pl.vqvae.config import import_external
from cogview_pl.vqvae.external import ExternalTokenizer, build_external, external_settings, trust_external


class Brightness(nn.Module):
    """A code is the mean brightness of a square of `edge` pixels, in `levels` steps."""

    def __init__(self, edge: int, levels: int = 5) -> None:
        super().__init__()
        self.downsampling, self.codebook_size = edge, levels
        self.gain = nn.Parameter(torch.rand(()) + 1)  # random, so that only a saved one comes back

    def encode(self, images: Tensor) -> Tensor:
        means = nn.functional.avg_pool2d(images.mean(1), self.downsampling)
        return (means * (self.codebook_size - 1)).round().int()

    def decode(self, codes: Tensor) -> Tensor:
        bright = codes[:, None].expand(-1, 3, -1, -1) / (self.codebook_size - 1) * self.gain
        return bright.repeat_interleave(self.downsampling, 2).repeat_interleave(self.downsampling, 3)


class Node:
    """A node of a configuration."""

    def __init__(self, target: Any) -> None:
        self._target_ = target


TARGET = f"{__name__}.Brightness"
SETTINGS = {"external": {"_target_": TARGET, "edge": 4}}
IMAGES = torch.cat([torch.zeros(1, 3, 8, 12), torch.full((1, 3, 8, 12), 0.5), torch.ones(1, 3, 8, 12)])


@pytest.fixture(autouse=True)
def _trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "_trusted", {})
    trust_external(TARGET)


def test_codes_and_images_are_those_of_the_class() -> None:
    model = build_external(SETTINGS)
    assert (model.codebook_size, model.downsampling) == (5, 4)
    codes = model.encode(IMAGES)
    assert codes.dtype == torch.int64
    assert codes.tolist() == [[[code] * 3] * 2 for code in (0, 2, 4)]
    torch.testing.assert_close(model.decode(codes), IMAGES * model.tokenizer.gain.detach())


def test_a_model_folder_keeps_class_arguments_and_weights(tmp_path: Path) -> None:
    model = build_external(SETTINGS)
    settings = external_settings(model, SETTINGS["external"])
    saved = ImageTokenizer(model, {**settings, "image_size": 8})
    save_image_tokenizer(tmp_path, saved)
    loaded = load_image_tokenizer(tmp_path)
    assert loaded.identity == saved.identity and loaded.grid == (2, 2)
    assert loaded.settings == {**SETTINGS, "codebook_size": 5, "downsampling": 4, "image_size": 8}
    assert torch.equal(loaded.model.decode(loaded.model.encode(IMAGES)), model.decode(model.encode(IMAGES)))
    external._trusted.clear()
    wanted = rf"names the image tokenizer '{re.escape(TARGET)}', which this run does not; name it in image_tokenizer"
    with pytest.raises(UserError, match=wanted):
        load_image_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encode": None}, "has no method encode; the class needs encode"),
        ({"decode": 3}, "has no method decode; the class needs encode"),
        ({"codebook_size": 5.0}, r"has codebook_size=5\.0; the class needs encode"),
        ({"downsampling": 0}, "has downsampling=0; the class needs encode"),
        ({"gain": None}, "has no parameters"),
    ],
)
def test_a_class_without_a_part_of_the_protocol(changes: dict[str, Any], words: str) -> None:
    given = Brightness(4)
    for name, value in changes.items():
        setattr(given, name, value)
    with pytest.raises(UserError, match=rf"^image_tokenizer\.external\._target_=my\.Class {words}"):
        ExternalTokenizer(given, "my.Class")


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        (
            torch.full((3, 2, 3), 5),
            r"encode gives codes from 5 to 5, codebook_size=5 allows 0 to 4; correct",
        ),
        (torch.full((3, 2, 3), -1), "encode gives codes from -1 to -1"),
        (
            torch.zeros(3, 2, 3),
            r"encode gives torch\.float32 \(3, 2, 3\) for \(3, 3, 8, 12\), needed are whole",
        ),
        (torch.zeros(3, 6).long(), r"encode gives torch\.int64 \(3, 6\) for .*needed are whole numbers \(3, 2, 3\)"),
        (None, "encode gives NoneType for"),
    ],
)
def test_codes_outside_the_protocol(codes: Any, words: str) -> None:
    model = build_external(SETTINGS)
    model.tokenizer.encode = lambda images: codes
    with pytest.raises(UserError, match=rf"^image_tokenizer\.external\._target_={re.escape(TARGET)}: {words}"):
        model.encode(IMAGES)


def test_images_outside_the_protocol() -> None:
    model = build_external(SETTINGS)
    model.tokenizer.decode = lambda codes: torch.zeros(3, 8, 12, 3)
    with pytest.raises(UserError, match=r"decode gives .*\(3, 8, 12, 3\) for \(3, 2, 3\), needed are floats \(3, 3, 8"):
        model.decode(torch.zeros(3, 2, 3).long())


def test_what_a_configuration_may_name() -> None:
    import_external(None)
    import_external(Node(TARGET))
    for target, words in (
        ("foo", "=foo names no class; give _target_=module.Class"),
        ("no_such_module.Mine", r"\._target_=no_such_module\.Mine: No module named 'no_such_module'; give module"),
        (f"{__name__}.Nothing", "has no attribute 'Nothing'; give module"),
        ("os.system", r"\._target_=os\.system is no subclass of torch\.nn\.Module"),
    ):
        with pytest.raises(UserError, match=rf"^image_tokenizer\.external.*{words}"):
            import_external(Node(target))
    with pytest.raises(UserError, match=r"missing a required argument: 'edge'; correct its arguments$"):
        build_external({"external": {"_target_": TARGET}})
    with pytest.raises(UserError, match="was not named by the configuration"):
        build_external({"external": {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}})
