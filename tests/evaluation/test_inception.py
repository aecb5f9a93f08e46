"""Inception v3 from state dicts: FID's network against values of torch-fidelity, torchvision's against torchvision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import Inception3, inception_v3
from torchvision.models.inception import BasicConv2d, InceptionA

from cogview_pl.errors import UserError
from cogview_pl.evaluation.features import open_features
from cogview_pl.evaluation.inception import _BlockA, _LastBlock, open_inception

from .fixed import fixed_values, fixed_weights

# What torch-fidelity 0.4.0 gives for `fid_weights()` and `images()`: every 256th feature, every 200th logit. Ours were
# equal to the bit on the machine where these were written down.
FEATURES = [
    [4.380662, 0.085802, 4.447636, 0.632979, 1.018172, 4.298028, 1.334986, 26.447712],
    [3.958707, 0.049602, 3.217826, 0.741679, 0.794700, 3.611412, 1.174755, 20.725922],
]
LOGITS = [
    [-1.831838, 25.134335, 6.107987, 11.843228, -8.558117, 7.510212],
    [-1.307141, 20.122213, 4.011752, 9.375857, -7.348643, 6.198056],
]


@pytest.fixture(scope="module")
def fid_weights() -> dict[str, Tensor]:
    with torch.device("meta"):
        model = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    return fixed_weights(model)


def images() -> Tensor:
    """Images `(2, 3, 299, 299)`."""
    found = fixed_values((2, 3, 299, 299), 0)
    found[1, :, :150] *= 0.3
    found[0, 0] **= 3
    return found


def test_numbers_of_torch_fidelity(fid_weights: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(fid_weights, file)
    network = open_features(file, device="cpu", resolution=None, trust=False, verify=True)
    assert (network.resolution, network.num_features, network.num_classes) == (299, 2048, 1008)
    found = network(images())
    assert found.logits is not None
    torch.testing.assert_close(found.features[:, ::256], torch.tensor(FEATURES), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits[:, ::200], torch.tensor(LOGITS), rtol=1e-4, atol=1e-4)


def test_torchvision(fid_weights: dict[str, Tensor], tmp_path: Path) -> None:
    theirs = inception_v3(weights=None, init_weights=False, transform_input=True)
    weights = {name: tensor for name, tensor in fid_weights.items() if not name.startswith("fc.")}
    theirs.load_state_dict(weights, strict=False)
    theirs.eval()
    save_file(theirs.state_dict(), tmp_path / "inception.safetensors")
    ours = open_features(tmp_path / "inception.safetensors", device="cpu", resolution=None, trust=False, verify=True)
    assert (ours.resolution, ours.num_features, ours.num_classes) == (299, 2048, 1000)
    mean, deviation = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        wanted = theirs((images() - mean) / deviation)
    torch.testing.assert_close(ours(images()).logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_border_is_left_out_of_means() -> None:
    """Blocks of FID's network differ from torchvision's only in the last channels, and means only at the border."""
    theirs, ours = InceptionA(4, 8).eval(), _BlockA(4, 8).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.ones(1, 4, 5, 5)
    with torch.no_grad():
        one, other = theirs(x), ours(x)
        pooled = theirs.branch_pool(x)  # the mean of ones is one
    assert torch.equal(one[:, :-8], other[:, :-8])
    torch.testing.assert_close(one[:, -8:, 1:-1, 1:-1], other[:, -8:, 1:-1, 1:-1])
    torch.testing.assert_close(other[:, -8:], pooled)
    assert (one[:, -8:] - pooled).abs().max() > 1e-3


def test_the_last_block_takes_the_maximum() -> None:
    with torch.device("meta"):
        block = _LastBlock(8)
    block.branch_pool = BasicConv2d(8, 192, kernel_size=1).eval()
    x = torch.randn(1, 8, 4, 4)
    wanted = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, stride=1)
    with torch.no_grad():
        torch.testing.assert_close(block.branch_pool(block._pool(x)), block.branch_pool(wanted))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fc.weight": None}, r"fc.weight is missing; give Inception v3 of FID \(1008, 2048\)"),
        ({"fc.weight": torch.zeros(10, 2048)}, r"fc.weight is \(10, 2048\)"),
        ({"Conv2d_1a_3x3.conv.weight": None}, "the Inception v3 of FID: Conv2d_1a_3x3.conv.weight is missing;"),
        ({"fc.bias": torch.zeros(1000)}, r"fc.bias has the shape \(1000,\) instead of \(1008,\)"),
        ({"fc.scale": torch.zeros(1)}, "fc.scale is unknown"),
    ],
)
def test_other_weights_are_named(fid_weights: dict[str, Tensor], change: dict[str, Tensor | None], words: str) -> None:
    given = {name: tensor for name, tensor in {**fid_weights, **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=words) as error:
        open_inception(given, Path("f.pth"), "key")
    assert "\n" not in str(error.value) and str(error.value).startswith("key=f.pth ")
