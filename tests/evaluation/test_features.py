"""Feature networks from files: both kinds of program, what is refused, and that nothing in a file runs unasked."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cogview_pl.errors import UserError
from cogview_pl.evaluation.features import FeatureNetwork, open_features

EDGE = 8


class Means(nn.Module):
    """Mean of each colour, and two logits."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = images.mean((2, 3))
        return features, features[:, :2] * 3


class Alone(nn.Module):
    """Features without logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class Maps(nn.Module):
    """No features: a picture."""

    def forward(self, images: Tensor) -> Tensor:
        return images * 2


class NotFinite(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)).log() / 0


class Writer(nn.Module):
    """Writes a file when it is called."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def forward(self, images: Tensor) -> Tensor:
        torch.save(images, self.target)
        return images.mean((2, 3))


class Loader(nn.Module):
    """Writes a file when it is loaded."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self.training = False

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.target)

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class Dropper:
    """A pickle that writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path, str]]:
        return Path.write_text, (self.target, "ran")


def traced(module: nn.Module, file: Path, **metadata: object) -> Path:
    program = torch.jit.trace(module.eval(), torch.zeros(2, 3, EDGE, EDGE))
    torch.jit.save(program, str(file), _extra_files={"cogview_pl.json": json.dumps(metadata)} if metadata else {})
    return file


def exported(module: nn.Module, file: Path, batch: object = torch.export.Dim.DYNAMIC, **metadata: object) -> Path:
    shapes = None if batch is None else {"images": {0: batch}}
    program = torch.export.export(module.eval(), (torch.zeros(2, 3, EDGE, EDGE),), dynamic_shapes=shapes)
    torch.export.save(program, file, extra_files={"cogview_pl.json": json.dumps(metadata)} if metadata else {})
    return file


def opened(file: Path, resolution: int | None = None, trust: bool = False) -> FeatureNetwork:
    return open_features(file, device="cpu", resolution=resolution, trust=trust)


def refusal(file: Path, resolution: int | None = EDGE, trust: bool = False) -> str:
    with pytest.raises(UserError) as found:
        opened(file, resolution, trust)
    message = str(found.value)
    assert message.startswith(f"evaluate.features={file}") and "\n" not in message
    return message


def test_torchscript_with_its_metadata(tmp_path: Path) -> None:
    file = traced(Means(), tmp_path / "n.bin", resolution=EDGE, classes=["red", "other"])
    network = opened(file)
    assert (network.resolution, network.num_features, network.num_classes) == (EDGE, 3, 2)
    assert network.classes == ("red", "other")
    assert network.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    images = torch.zeros(3, 3, 2 * EDGE, 2 * EDGE)
    images[:, 1] = 0.5
    found = network(images)
    torch.testing.assert_close(found.features, torch.tensor([[0.0, 0.5, 0.0]] * 3))
    torch.testing.assert_close(found.logits, torch.tensor([[0.0, 1.5]] * 3))


def test_torchscript_without_metadata_needs_a_resolution(tmp_path: Path) -> None:
    file = traced(Alone(), tmp_path / "n.pt")
    network = opened(file, EDGE)
    assert network.classes is None and network.num_classes is None
    assert network(torch.rand(2, 3, EDGE, EDGE)).logits is None
    assert "evaluate.resolution" in refusal(file, None)


def test_exported_program_only_if_trusted(tmp_path: Path) -> None:
    file = exported(Means(), tmp_path / "n.pt2", resolution=EDGE)
    assert "evaluate.trust_features=true" in refusal(file)
    network = opened(file, trust=True)
    images = torch.rand(5, 3, EDGE, EDGE)
    torch.testing.assert_close(network(images).features, images.mean((2, 3)))


def test_exported_program_of_one_batch_size(tmp_path: Path) -> None:
    assert "batch of 1" in refusal(exported(Means(), tmp_path / "n.pt2", batch=None), trust=True)


def test_no_network(tmp_path: Path) -> None:
    file = tmp_path / "n.pt"
    assert "does not exist" in refusal(file)
    file.write_bytes(b"nothing")
    assert "TorchScript" in refusal(file)
    torch.save({"weight": torch.zeros(2)}, file)
    assert "weights alone" in refusal(file)
    good = traced(Means(), tmp_path / "good.pt").read_bytes()
    file.write_bytes(good[: len(good) // 2])
    assert "TorchScript" in refusal(file)


@pytest.mark.parametrize("module", [Maps(), NotFinite()], ids=["maps", "not_finite"])
def test_wrong_output(module: nn.Module, tmp_path: Path) -> None:
    assert "features (B, F)" in refusal(traced(module, tmp_path / "n.pt"))


def test_classes_that_do_not_match(tmp_path: Path) -> None:
    assert "3 classes" in refusal(traced(Means(), tmp_path / "n.pt", resolution=EDGE, classes=["a", "b", "c"]))


@pytest.mark.parametrize("module", [Writer, Loader])
def test_torchscript_that_reaches_for_files(module: type[nn.Module], tmp_path: Path) -> None:
    target = tmp_path / "written"
    file = tmp_path / "n.pt"
    torch.jit.save(torch.jit.script(module(str(target))), str(file))
    assert "was refused" in refusal(file)
    assert not target.exists()


def test_pickles_in_an_exported_program(tmp_path: Path) -> None:
    target, file = tmp_path / "written", tmp_path / "n.pt2"
    source = zipfile.ZipFile(exported(Means(), tmp_path / "good.pt2", resolution=EDGE))
    with zipfile.ZipFile(file, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            archive.writestr(name, pickle.dumps(Dropper(target)) if "sample_inputs" in name else content)
    assert "can run code" in refusal(file)
    assert not target.exists()
