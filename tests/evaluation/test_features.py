"""Feature networks from folders and files: some are accepted, some refused, and no code runs without consent."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from cogview_pl.errors import UserError
from cogview_pl.evaluation.feature_folder import TrainedOn, save_toy_network
from cogview_pl.evaluation.features import FeatureNetwork, open_features
from cogview_pl.evaluation.style_network import ToyNetwork

from ..checkpoints.saved import forge_manifest, save_tokenizer
from ..faults.injections import flip
from .hostile import DISGUISES, hostile_archive

EDGE = 8
TOY_EDGE = 16
CLASSES = ("flat", "oil", "ink")
TRAINED_ON = TrainedOn("cogview_pl.toy_world.dataset.ToyDataset", images=8, fingerprint="0")


class Means(nn.Module):
    """A network that gives the mean of each colour, and two logits."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = images.mean((2, 3))
        return features, features[:, :2] * 3


class Alone(nn.Module):
    """A network without logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class Maps(nn.Module):
    """A network that gives an image, not features."""

    def forward(self, images: Tensor) -> Tensor:
        return images * 2


class NotFinite(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)).log() / 0


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


def opened(path: Path, resolution: int | None = None, trust: bool = False, verify: bool = True) -> FeatureNetwork:
    return open_features(path, device="cpu", resolution=resolution, trust=trust, verify=verify)


def refusal(path: Path, resolution: int | None = EDGE, trust: bool = False) -> str:
    with pytest.raises(UserError) as found:
        opened(path, resolution, trust)
    message = str(found.value)
    assert str(path) in message and "\n" not in message
    return message


# --- our own network ---


@pytest.fixture
def network() -> ToyNetwork:
    torch.manual_seed(0)
    return ToyNetwork(2, 8, len(CLASSES)).eval()


@pytest.fixture
def run(network: ToyNetwork, tmp_path: Path) -> Path:
    """A run folder with the network above."""
    save_toy_network(network, tmp_path / "run" / "model", TOY_EDGE, CLASSES, TRAINED_ON)
    return tmp_path / "run"


def test_our_network_is_the_same_after_its_folder(network: ToyNetwork, run: Path) -> None:
    images = torch.rand(3, 3, TOY_EDGE, TOY_EDGE)
    with torch.no_grad():
        features, logits = network(images)
    for path in (run, run / "model"):
        found = opened(path)
        assert (found.resolution, found.classes, found.num_features) == (TOY_EDGE, CLASSES, 8)
        torch.testing.assert_close(tuple(found(images)), (features, logits))
    assert len(found.sha256) == 64
    nn.init.ones_(network.features.bias)
    save_toy_network(network, run / "model", TOY_EDGE, CLASSES, TRAINED_ON)
    assert opened(run).sha256 != found.sha256
    assert opened(run, 2 * TOY_EDGE).resolution == 2 * TOY_EDGE


def test_a_flipped_bit_is_never_believed(run: Path) -> None:
    files, random = sorted((run / "model").iterdir()), Random(1)
    believed = 0
    for number in range(100):
        file = files[number % len(files)]
        whole = file.read_bytes()
        flip(file, random)
        try:
            opened(run)
            believed += file.name != "manifest.json"  # white space does not change the network
        except UserError as error:
            assert "\n" not in str(error)
        file.write_bytes(whole)
    assert believed == 0
    opened(run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolution": 0}, "resolution is 0"),
        ({"resolution": True}, "resolution is True"),
        ({"resolution": 10**9}, "resolution is 1000000000"),
        ({"classes": "flat"}, "classes is 'flat'"),
        ({"classes": ["flat", "oil"]}, "does not fit its config.yaml"),
        ({"toy_network": {"hidden_size": 10**6, "num_features": 8}}, "does not fit its config.yaml"),
        ({"toy_network": {"hidden_size": 10**9, "num_features": 8}}, "damaged"),
        ({"toy_network": {"hidden_size": 2}}, "num_features"),
        ({"toy_network": None}, "damaged"),
    ],
)
def test_settings_are_not_believed(run: Path, changes: dict[str, object], words: str) -> None:
    """A manifest is forged too, because an attacker would change the hashes as well."""
    file = run / "model" / "config.yaml"
    OmegaConf.save({**OmegaConf.load(file), **changes}, file)
    forge_manifest(run / "model")
    assert words in refusal(run)


def test_other_folders(run: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "vqvae" / "model")
    assert "task=features" in refusal(tmp_path / "vqvae")
    (run / "model" / "config.yaml").unlink()
    assert "holds no model/" in refusal(run)


# --- files of other programs ---


def test_no_network(tmp_path: Path) -> None:
    file = tmp_path / "n.pt"
    assert "does not exist" in refusal(file)
    for content in (b"", b"nothing", traced(Means(), tmp_path / "good.pt").read_bytes()[:900]):
        file.write_bytes(content)
        assert "damaged" in refusal(file)
    torch.save({"weight": torch.zeros(2)}, file)
    assert "fc.weight is missing" in refusal(file, trust=True)


def test_a_pickle_that_would_run_code(tmp_path: Path) -> None:
    target, file = tmp_path / "written", tmp_path / "n.pth"
    for old_format in (True, False):
        torch.save({"fc.weight": Dropper(target)}, file, _use_new_zipfile_serialization=not old_format)
        for trust in (True, False):  # trust matters for programs only
            assert "was refused" in refusal(file, trust=trust)
    assert not target.exists()


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("disguise", DISGUISES)
def test_torchscript_that_writes_when_it_is_opened(disguise: str, twice: bool, tmp_path: Path) -> None:
    target = tmp_path / "written"
    file = hostile_archive(tmp_path / "inception_v3.pt", target, disguise, twice)
    assert "evaluate.trust_features=true" in refusal(file)
    assert not target.exists()
    opened(file, EDGE, trust=True)
    assert target.exists()  # the test would notice


def test_weights_with_a_program_beside_them(tmp_path: Path) -> None:
    target, file = tmp_path / "written", tmp_path / "n.pt"
    torch.save({"fc.weight": torch.zeros(2)}, file)
    program = zipfile.ZipFile(hostile_archive(tmp_path / "hostile.pt", target))
    with zipfile.ZipFile(file, "a") as archive:
        for name in program.namelist():
            if name.endswith((".py", "constants.pkl")):
                archive.writestr(f"n/{name.partition('/')[2]}", program.read(name))
    assert "evaluate.trust_features=true" in refusal(file)
    assert not target.exists()


@pytest.mark.parametrize("entry", ["n/data.pkl", "N/version", "n/DATA.PKL", "data.pkl"])
def test_weights_with_an_entry_that_torch_does_not_write(entry: str, tmp_path: Path) -> None:
    file = tmp_path / "n.pt"
    torch.save({"fc.weight": torch.zeros(2)}, file)
    assert "fc.weight is (2,)" in refusal(file)
    with warnings.catch_warnings(), zipfile.ZipFile(file, "a") as archive:
        warnings.simplefilter("ignore")  # warning about a duplicate entry
        archive.writestr(entry, b"")
    assert "evaluate.trust_features=true" in refusal(file)


def test_pickles_in_an_exported_program(tmp_path: Path) -> None:
    target, file = tmp_path / "written", tmp_path / "n.pt2"
    source = zipfile.ZipFile(exported(Means(), tmp_path / "good.pt2", resolution=EDGE))
    with zipfile.ZipFile(file, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            archive.writestr(name, pickle.dumps(Dropper(target)) if "sample_inputs" in name else content)
    assert "evaluate.trust_features=true" in refusal(file)
    assert not target.exists()


def test_torchscript_with_its_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = traced(Means(), tmp_path / "n.bin", resolution=EDGE, classes=["red", "other"])
    network = opened(file, trust=True)
    assert f"evaluate.features={file} runs code from this file" in caplog.text
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
    network = opened(file, EDGE, trust=True)
    assert network.classes is None and network.num_classes is None
    assert network(torch.rand(2, 3, EDGE, EDGE)).logits is None
    assert "evaluate.resolution" in refusal(file, None, trust=True)


def test_exported_program(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = opened(exported(Means(), tmp_path / "n.pt2", resolution=EDGE), trust=True)
    assert "runs code" in caplog.text
    images = torch.rand(5, 3, EDGE, EDGE)
    torch.testing.assert_close(network(images).features, images.mean((2, 3)))
    assert "batch of 1" in refusal(exported(Means(), tmp_path / "fixed.pt2", batch=None), trust=True)


def test_an_archive_that_is_no_program(tmp_path: Path) -> None:
    file = tmp_path / "n.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("n/readme", "nothing")
    assert "evaluate.trust_features=true" in refusal(file)
    assert "cannot be opened" in refusal(file, trust=True)


@pytest.mark.parametrize("module", [Maps(), NotFinite()], ids=["maps", "not_finite"])
def test_wrong_output(module: nn.Module, tmp_path: Path) -> None:
    assert "features (B, F)" in refusal(traced(module, tmp_path / "n.pt"), trust=True)


def test_classes_that_do_not_match(tmp_path: Path) -> None:
    file = traced(Means(), tmp_path / "n.pt", resolution=EDGE, classes=["a", "b", "c"])
    assert "3 classes" in refusal(file, trust=True)
