"""The image tokenizer as a whole: shapes, normalisation, consistency of its methods, losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.checkpoints.settings import from_plain
from cogview_pl.errors import UserError
from cogview_pl.vqvae.config import Reconstruction, VQVAEConfig
from cogview_pl.vqvae.losses import psnr, reconstruction_loss
from cogview_pl.vqvae.model import VQVAE, ResidualBlock, build_decoder, build_encoder
from cogview_pl.vqvae.quantizer import FixedQuantizer
from tests.make_models import make_vqvae, vqvae_settings

KINDS = ["ema", "learned", "gumbel", "fixed", "cosine", "fsq"]
SIZES = {"hidden_size": 16, "codebook_dim": 8, "codebook_size": 32}
HAND = from_plain(
    VQVAEConfig,
    vqvae_settings(hidden_size=6, codebook_dim=5, codebook_size=4, downsampling=4, residual_blocks=2),
)


def build(kind="ema", downsampling=4, residual_blocks=0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
    torch.manual_seed(0)
    return make_vqvae(
        kind,
        **SIZES,
        downsampling=downsampling,
        residual_blocks=residual_blocks,
        mean=list(mean),
        std=list(std),
    )


@pytest.mark.slow
def test_compiled_convolutions_give_the_same_gradients():
    images = torch.rand(2, 3, 16, 16)
    found = []
    for compiled in (False, True):
        model = build("fixed", residual_blocks=1)
        names = list(model.state_dict())
        if compiled:
            model.encoder.compile()
            model.decoder.compile()
        output = model(images)
        (reconstruction_loss(Reconstruction.l2, output.reconstruction, images) + output.quantized.loss).backward()
        assert list(model.state_dict()) == names
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("residual_blocks", [0, 2])
@pytest.mark.parametrize("downsampling", [4, 8, 16])
def test_shapes(downsampling, residual_blocks):
    model = build(downsampling=downsampling, residual_blocks=residual_blocks).eval()
    images = torch.rand(2, 3, 2 * downsampling, 3 * downsampling)
    codes = model.encode(images)
    assert codes.shape == (2, 2, 3)
    assert codes.dtype == torch.int64
    assert model.codebook_size == 32
    assert codes.min() >= 0
    assert codes.max() < 32
    assert model.latents(images).shape == (2, 8, 2, 3)
    assert model.decode(codes).shape == images.shape
    assert model.downsampling == downsampling


def test_released_size_has_the_released_parameter_shapes():
    with torch.device("meta"):
        model = make_vqvae(
            hidden_size=512,
            codebook_dim=256,
            codebook_size=8192,
            downsampling=8,
            residual_blocks=0,
            mean=[0.79093, 0.76271, 0.75340],
            std=[0.30379, 0.32279, 0.32800],
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {
        "encoder.0.weight": (512, 3, 4, 4),
        "encoder.0.bias": (512,),
        "encoder.2.weight": (512, 512, 4, 4),
        "encoder.2.bias": (512,),
        "encoder.4.weight": (512, 512, 4, 4),
        "encoder.4.bias": (512,),
        "encoder.6.weight": (256, 512, 1, 1),
        "encoder.6.bias": (256,),
        "decoder.0.weight": (256, 512, 4, 4),
        "decoder.0.bias": (512,),
        "decoder.2.weight": (512, 512, 4, 4),
        "decoder.2.bias": (512,),
        "decoder.4.weight": (512, 512, 4, 4),
        "decoder.4.bias": (512,),
        "decoder.6.weight": (3, 512, 1, 1),
        "decoder.6.bias": (3,),
    }
    assert model.quantizer.codebook.shape == (256, 8192)
    assert model.quantizer.cluster_size.shape == (8192,)
    assert model.quantizer.embed_avg.shape == (256, 8192)


def residual_by_hand(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """x + conv1x1(relu(conv3x3(relu(x))))"""
    inner = F.conv2d(x.clamp(min=0), weights[f"{name}layers.1.weight"], weights[f"{name}layers.1.bias"], padding=1)
    outer = F.conv2d(inner.clamp(min=0), weights[f"{name}layers.3.weight"], weights[f"{name}layers.3.bias"])
    return x + outer


@torch.no_grad()
def test_residual_block_equals_the_formula() -> None:
    torch.manual_seed(0)
    block, x = ResidualBlock(5, hidden=7).double(), torch.randn(2, 5, 4, 6, dtype=torch.float64)
    before = x.clone()
    torch.testing.assert_close(block(x), residual_by_hand(x, block.state_dict(), ""))
    assert torch.equal(x, before)  # the sum needs it as it was


@torch.no_grad()
def test_encoder_equals_the_formula() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(HAND).double()
    weights = encoder.state_dict()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    x = images
    for layer in (0, 2):
        x = F.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], stride=2, padding=1).clamp(min=0)
    for layer in (4, 5):
        x = residual_by_hand(x, weights, f"{layer}.")
    expected = torch.einsum("bcyx,dc->bdyx", x, weights["6.weight"][:, :, 0, 0]) + weights["6.bias"][:, None, None]
    torch.testing.assert_close(encoder(images), expected)
    assert expected.shape == (2, 5, 2, 3)
    assert weights["4.layers.1.weight"].shape == (6, 6, 3, 3)


@torch.no_grad()
def test_decoder_equals_the_formula() -> None:
    torch.manual_seed(0)
    decoder = build_decoder(HAND).double()
    weights = decoder.state_dict()
    vectors = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    x = vectors
    for layer in (0, 1):
        x = residual_by_hand(x, weights, f"{layer}.")
    for layer in (2, 4):
        x = F.conv_transpose2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], stride=2, padding=1)
        x = x.clamp(min=0)
    expected = torch.einsum("bcyx,dc->bdyx", x, weights["6.weight"][:, :, 0, 0]) + weights["6.bias"][:, None, None]
    torch.testing.assert_close(decoder(vectors), expected)
    assert expected.shape == (2, 3, 8, 12)
    assert weights["0.layers.1.weight"].shape == (6, 5, 3, 3)


@torch.no_grad()
def test_without_quantization_it_is_decoder_of_encoder() -> None:
    model, images = build().eval(), torch.rand(2, 3, 8, 8)
    expected = model.decoder(model.encoder((images - 0.5) / 0.25)) * 0.25 + 0.5
    torch.testing.assert_close(model.reconstruct_continuous(images), expected)


def test_silent_residual_blocks_leave_the_plain_network():
    plain, residual = build().eval(), build(residual_blocks=2).eval()
    residual.quantizer.load_state_dict(plain.quantizer.state_dict())
    # The blocks sit before the encoder's last layer and before the decoder's first.
    for i, layer in enumerate(plain.encoder):
        residual.encoder[i if i < 4 else i + 2].load_state_dict(layer.state_dict())
    for i, layer in enumerate(plain.decoder):
        residual.decoder[i + 2].load_state_dict(layer.state_dict())
    images = torch.rand(2, 3, 16, 16)
    changed = residual(images).reconstruction
    for block in [*residual.encoder[4:6], *residual.decoder[:2]]:
        torch.nn.init.zeros_(block.layers[-1].weight)
        torch.nn.init.zeros_(block.layers[-1].bias)
    expected = plain(images).reconstruction
    torch.testing.assert_close(residual(images).reconstruction, expected)
    assert not torch.allclose(changed, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_decode_of_encode(kind):
    model = build(kind).eval()
    images = torch.rand(2, 3, 16, 24)
    output = model(images)
    codes = model.encode(images)
    assert torch.equal(output.quantized.codes, codes)
    assert torch.equal(output.reconstruction, model.decode(codes))


def test_normalisation_is_inside():
    images = torch.rand(2, 3, 16, 16)
    mean, std = (0.7, 0.2, 0.4), (0.3, 0.1, 0.2)
    inside, outside = build(mean=mean, std=std).eval(), build(mean=(0, 0, 0), std=(1, 1, 1)).eval()
    mean_C11, std_C11 = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    codes = inside.encode(images)
    assert torch.equal(codes, outside.encode((images - mean_C11) / std_C11))
    torch.testing.assert_close(inside.decode(codes), outside.decode(codes) * std_C11 + mean_C11)


def test_normalisation_travels_with_the_weights():
    source, target = build(mean=(0.7, 0.2, 0.4), std=(0.3, 0.1, 0.2)), build()
    target.load_state_dict(source.state_dict())
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(source.eval()(images).reconstruction, target.eval()(images).reconstruction)


def test_decode_does_not_clip():
    model = build()
    torch.nn.init.zeros_(model.decoder[-1].weight)
    torch.nn.init.constant_(model.decoder[-1].bias, 10.0)
    images = model.decode(torch.zeros(1, 2, 2, dtype=torch.int64))
    torch.testing.assert_close(images, torch.full((1, 3, 8, 8), 10 * 0.25 + 0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_changes_nothing_but_the_layout(kind):
    model = build(kind).eval()
    images = torch.rand(2, 3, 16, 16)
    expected, codes = model(images).reconstruction, model.encode(images)
    model = model.to(memory_format=torch.channels_last)
    assert torch.equal(model.encode(images), codes)
    torch.testing.assert_close(model(images).reconstruction, expected)
    quantized = model(images).quantized.quantized
    assert quantized.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_changes_nothing(kind):
    model = build(kind).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.rand(2, 3, 16, 16)
    random_state = torch.get_rng_state()
    model(images)
    model.decode(model.encode(images))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("kind", KINDS)
def test_colours_pass_through_the_codes(kind):
    model = build(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    palette = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])

    def batch() -> torch.Tensor:
        colours = palette[torch.randint(4, (8, 2, 2))].permute(0, 3, 1, 2)
        return colours.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)

    for step in range(250):
        images = batch()
        model.quantizer.set_progress(step / 250)
        output = model(images)
        loss = reconstruction_loss(Reconstruction.l2, output.reconstruction, images) + output.quantized.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images = batch()
    blank = images.mean((0, 2, 3), keepdim=True).expand_as(images)
    with torch.no_grad():
        reconstruction = model.eval()(images).reconstruction
    # Runs differ much in how many codes they use after so few steps; using none gives the blank's value.
    assert psnr(reconstruction, images) > psnr(blank, images) + 1.5


@pytest.mark.parametrize("size", [(15, 16), (16, 18)])
def test_edges_must_fit_the_downsampling(size):
    model = build()
    with pytest.raises(UserError, match=rf"{size[0]} x {size[1]}.*multiples of 4"):
        model.encode(torch.rand(1, 3, *size))
    with pytest.raises(UserError, match="downsampling"):
        model(torch.rand(1, 3, *size))


def test_settings_that_do_not_fit():
    with pytest.raises(UserError, match=r"image_tokenizer\.downsampling is 5"):
        build(downsampling=5)
    with pytest.raises(ValueError, match=r"^std\[2\] is 0\.0, must be from 1e-9 to 1e9$"):
        build(std=(0.1, 0.2, 0.0))
    for wrong in ({"std": (0.1,) * 4}, {"mean": (0.5, 0.5)}, {"mean": (0.5,) * 4}):
        with pytest.raises(UserError, match=r"image_tokenizer\.mean=.*: give three numbers each, std above 0"):
            build(**wrong)
    for codebook_size, codebook_dim in ((64, 8), (32, 4)):
        wrong = {"_target_": f"{__name__}.Stubborn", "sizes": [codebook_size, codebook_dim]}
        config = from_plain(VQVAEConfig, {**vqvae_settings(**SIZES), "quantizer": wrong})
        with pytest.raises(
            UserError, match=rf"{codebook_size} codes of size {codebook_dim}.*codebook_size=32 and codebook_dim=8"
        ):
            VQVAE(config)


class Stubborn(FixedQuantizer):
    """A quantizer with sizes of its own."""

    def __init__(self, *, codebook_size: int, codebook_dim: int, sizes: list[int]) -> None:
        super().__init__(codebook_size=sizes[0], codebook_dim=sizes[1], commitment_weight=0.25)


def test_reconstruction_loss_values():
    images = torch.zeros(1, 3, 2, 2)
    reconstruction = torch.full((1, 3, 2, 2), -0.5)
    assert reconstruction_loss(Reconstruction.l1, reconstruction, images).item() == pytest.approx(0.5)
    assert reconstruction_loss(Reconstruction.l2, reconstruction, images).item() == pytest.approx(0.25)


def test_psnr_averages_images_and_clips():
    images = torch.zeros(2, 3, 4, 4)
    reconstruction = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert psnr(reconstruction, images).item() == pytest.approx((20 + 40) / 2, abs=1e-3)
    # What lies outside 0..1 is cut off when an image is saved, so it costs nothing.
    too_bright, images = torch.full((1, 3, 4, 4), 5.0), torch.full((1, 3, 4, 4), 0.9)
    assert psnr(too_bright, images).item() == pytest.approx(20, abs=1e-3)
    assert torch.isfinite(psnr(images, images))
