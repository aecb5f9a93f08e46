"""A user's own quantizer: found by name if it is imported; a model folder imports nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cogview_pl.checkpoints.model_folder import (
    IMAGE_TOKENIZER,
    ImageTokenizer,
    build_vqvae,
    load_image_tokenizer,
    read_model_settings,
    save_image_tokenizer,
)
from cogview_pl.checkpoints.settings import CONFIG, read_settings, write_settings
from cogview_pl.errors import UserError
from cogview_pl.vqvae.config import BUILT_IN, import_quantizer
from cogview_pl.vqvae.quantizer import FixedQuantizer, Quantizer
from cogview_pl.vqvae.quantizer_registry import build_quantizer, quantizer_class
from tests.checkpoints import saved
from tests.checkpoints.saved import VQVAE
from tests.make_models import vqvae_settings

SIZES = {"hidden_size": 8, "codebook_dim": 4, "codebook_size": 16}
SOURCE = """
from pathlib import Path

from cogview_pl.vqvae.quantizer import FixedQuantizer

Path(__file__).with_suffix(".imported").touch()


class Scaled(FixedQuantizer):
    def __init__(self, *, codebook_size: int, codebook_dim: int, factor: float) -> None:
        super().__init__(codebook_size=codebook_size, codebook_dim=codebook_dim, commitment_weight=0.25)
        self.codebook *= factor
"""


class Node:
    """A node of a configuration."""

    def __init__(self, target: Any) -> None:
        self._target_ = target


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module in the working folder that defines `Scaled`; not imported."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def save(folder: Path, target: str, **arguments: Any) -> None:
    """A model folder whose settings name any class, as a stranger could write it."""
    saved.save_tokenizer(folder)
    settings = read_settings(folder)
    settings["vqvae"]["quantizer"] = {"_target_": target, **arguments}
    write_settings(folder, settings)
    saved.forge_manifest(folder)


def test_its_arguments_reach_it(module: str, tmp_path: Path) -> None:
    import_quantizer(Node(f"{module}.Scaled"))
    torch.manual_seed(0)
    model = build_vqvae({**vqvae_settings(**SIZES), "quantizer": {"_target_": f"{module}.Scaled", "factor": 3.0}})
    torch.manual_seed(0)
    plain = FixedQuantizer(codebook_size=16, codebook_dim=4, commitment_weight=0.25)
    assert torch.equal(model.quantizer.codebook, 3 * plain.codebook)
    settings = {**vqvae_settings(**SIZES), "quantizer": {"_target_": f"{module}.Scaled", "factor": 3.0}}
    save_image_tokenizer(tmp_path / "model", ImageTokenizer(model, {**settings, "image_size": 16}))
    loaded = load_image_tokenizer(tmp_path / "model")
    assert type(loaded.model.quantizer).__name__ == "Scaled"
    assert torch.equal(loaded.model.quantizer.codebook, model.quantizer.codebook)


def test_a_folder_imports_nothing(module: str, tmp_path: Path) -> None:
    save(tmp_path / "model", f"{module}.Scaled", factor=3.0)
    for read in (
        lambda: load_image_tokenizer(tmp_path / "model"),
        lambda: read_model_settings(tmp_path / "model", IMAGE_TOKENIZER, "image_tokenizer.path"),
    ):
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value) == (
            f"image_tokenizer.path={tmp_path / 'model'}: config.yaml names the quantizer '{module}.Scaled', which is "
            "not imported; name it in image_tokenizer.quantizer._target_ if you trust its file (in Python: import its "
            "module first)"
        )
    assert module not in sys.modules and not (tmp_path / f"{module}.imported").exists()


@pytest.mark.parametrize(
    "target", ["os.system", "builtins.eval", "torch.nn.Linear", f"{BUILT_IN}.Quantizer", "cogview_pl.vqvae.model.VQVAE"]
)
def test_a_folder_names_quantizers_only(tmp_path: Path, target: str) -> None:
    save(tmp_path / "model", target, command="touch pwned")
    with pytest.raises(UserError, match=f"config.yaml names the quantizer '{target}', which is not imported"):
        load_image_tokenizer(tmp_path / "model")


def test_nested_targets_in_a_folder_stay_values(tmp_path: Path) -> None:
    save(tmp_path / "model", f"{BUILT_IN}.FixedQuantizer", commitment_weight={"_target_": "os.getcwd"})
    with pytest.raises(UserError, match=r"config\.yaml is damaged \(commitment_weight is \{'_target_'"):
        load_image_tokenizer(tmp_path / "model")


@pytest.mark.parametrize("quantizer", [None, 3, ["a"], {}, {"decay": 0.9}])
def test_a_folder_without_a_class(tmp_path: Path, quantizer: Any) -> None:
    saved.save_tokenizer(tmp_path)
    write_settings(tmp_path, read_settings(tmp_path) | {"vqvae": VQVAE | {"quantizer": quantizer}})
    with pytest.raises(UserError, match=f"{CONFIG} is damaged"):
        load_image_tokenizer(tmp_path, verify=False)


def test_what_a_configuration_may_name(module: str) -> None:
    import_quantizer(Node(f"{BUILT_IN}.EMAQuantizer"))
    assert quantizer_class(f"{BUILT_IN}.FixedQuantizer") is FixedQuantizer
    for target in (f"{BUILT_IN}.EMAQuantiser", f"{module}.Scaled", f"{BUILT_IN}.Quantizer"):
        with pytest.raises(UserError, match=f"^image_tokenizer.quantizer._target_={target} is no imported subclass of"):
            quantizer_class(target)
    for found in ("foo", None, 3):
        with pytest.raises(UserError, match=r"^image_tokenizer\.quantizer=.* names no class; choose "):
            import_quantizer(Node(found))
    with pytest.raises(UserError, match=r"^image_tokenizer\.quantizer=foo names no class"):
        import_quantizer("foo")
    with pytest.raises(UserError, match=r"_target_=no_such_module\.Mine: No module named 'no_such_module'; give"):
        import_quantizer(Node("no_such_module.Mine"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "missing a required argument: 'commitment_weight'"),
        ({"foo": 1}, "got an unexpected keyword argument 'foo'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    options = {
        "_target_": f"{BUILT_IN}.FixedQuantizer",
        **({"commitment_weight": 0.1} if arguments else {}),
        **arguments,
    }
    with pytest.raises(UserError, match=f"^image_tokenizer.quantizer: FixedQuantizer: {words}; correct its arguments$"):
        build_quantizer(options, codebook_size=4, codebook_dim=2)


def test_the_base_class_is_no_quantizer() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Quantizer(codebook_size=4, codebook_dim=2)  # type: ignore[abstract]
