"""The image tokenizer against the original: codes, images, gradients, codebook updates, relaxed choices.

Shapes: B batch, y x the grid, D codebook_dim, K codes. The original keeps latents channels last, `(B, y, x, D)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cogview_pl.checkpoints.released import load_vqvae
from cogview_pl.data.decoding.decode import load_image
from cogview_pl.vqvae.codebook import gather_statistics, squared_distances
from cogview_pl.vqvae.model import VQVAE
from cogview_pl.vqvae.quantizer import EMAQuantizer
from tests.make_models import make_quantizer

from .conftest import Records

LIMIT = 1e-5  # of the largest recorded value: a tenth of what the records ask for
BUFFERS = {"embed": "codebook", "cluster_size": "cluster_size", "embed_avg": "embed_avg"}  # theirs → ours


def assert_near(found: Tensor, recorded: Tensor, what: str) -> None:
    """Equal up to `LIMIT` of the largest recorded value."""
    atol = LIMIT * recorded.abs().max().item()
    torch.testing.assert_close(found, recorded, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def to_images(model: VQVAE, normalised: Tensor) -> Tensor:
    """Recorded inputs are normalised; ours are on the scale 0 … 1."""
    return normalised * model.std + model.mean


@pytest.fixture
def model(parity: Records) -> VQVAE:
    return load_vqvae(parity / "vqvae/model.pt")


# Evaluation


def recorded_inputs(parity: Records) -> Iterator[tuple[VQVAE, dict[str, Tensor], str]]:
    """Every model with the records of each of its inputs, and what to call them in messages."""
    for file, entry in parity.json("vqvae/meta.json")["models"].items():
        model, records = load_vqvae(parity / f"vqvae/{file}"), parity.tensors(f"vqvae/{entry['io']}")
        for index in range(len(entry["inputs"])):
            suffix = f"_{index}"
            own = {name.removesuffix(suffix): records[name] for name in records if name.endswith(suffix)}
            yield model, own, f"{file}, input {index}"


@torch.no_grad()
def test_images_to_codes(parity: Records) -> None:
    for model, record, what in recorded_inputs(parity):
        images = to_images(model, record["images"])
        for latents in (model.encoder(record["images"]), model.latents(images)):
            assert_near(channels_last(latents), record["latents"], f"{what}, latents")
        distances = squared_distances(record["latents"].flatten(0, 2), model.quantizer.codebook)
        assert_near(distances, record["distances"], f"{what}, distances")
        codes = model.encode(images)
        assert torch.equal(codes, record["codes_grid"]), what
        assert torch.equal(codes.flatten(1), record["codes"]), what


@torch.no_grad()
def test_codes_to_images(parity: Records) -> None:
    for model, record, what in recorded_inputs(parity):
        assert_near(model.decoder(record["quantized"]), record["decoded"], f"{what}, decoder")
        assert_near(model.decode(record["codes_grid"]), record["decoded_image"], f"{what}, decode")


@torch.no_grad()
def test_images_to_images(parity: Records) -> None:
    for model, record, what in recorded_inputs(parity):
        found = model(to_images(model, record["images"]))
        assert_near(found.reconstruction, record["decoded_image"], f"{what}, image")
        assert_near(found.quantized.quantized, record["quantized"], f"{what}, quantized")
        assert_near(found.quantized.commitment.reshape(1), record["diff"], f"{what}, diff")
        assert torch.equal(found.quantized.codes, record["codes_grid"]), what


# Training


def test_one_training_step(parity: Records, model: VQVAE) -> None:
    record = parity.tensors("vqvae/train_forward.safetensors")
    model.quantizer.commitment_weight = 0.25  # the choice of this record
    found = model.train()(to_images(model, record["images"]))
    decoded = (found.reconstruction - model.mean) / model.std
    loss = F.mse_loss(decoded, record["images"]) + found.quantized.loss
    loss.backward()
    assert_near(decoded, record["decoded"], "decoded")
    assert_near(found.quantized.commitment.reshape(1), record["diff"], "diff")
    assert_near(loss.reshape(1), record["loss"], "loss")
    gradients = {name.removeprefix("grad."): tensor for name, tensor in record.items() if name.startswith("grad.")}
    parameters = {
        re.sub("^encoder", "enc_b.blocks", re.sub("^decoder", "dec.blocks", name)): parameter
        for name, parameter in model.named_parameters()
    }
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        assert_near(parameters[name].grad, gradient, name)  # type: ignore[arg-type]
    for theirs, ours in BUFFERS.items():
        assert_near(getattr(model.quantizer, ours), record[f"{theirs}_after"], theirs)


def ema_quantizer(record: dict[str, Tensor], start: str) -> EMAQuantizer:
    """A quantizer with the recorded start, the original's decay and no upkeep of our own."""
    codebook_dim, codebook_size = record[f"{start}.start.embed"].shape
    quantizer = make_quantizer(
        "ema",
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        decay=0.99,
        commitment_weight=1.0,
        kmeans_iters=0,
        revive_every=0,
    )
    for theirs, ours in BUFFERS.items():
        getattr(quantizer, ours).copy_(record[f"{start}.start.{theirs}"])
    return quantizer


def recorded_runs(parity: Records, mode: str) -> dict[str, int]:
    """Recorded runs of a quantizer mode: name → number of steps."""
    runs = parity.json("vqvae/meta.json")["quantizer_train"]
    found = {name: len(steps) for name, steps in runs.items() if name.split(".")[1] == mode}
    assert found
    return found


def assert_buffers(quantizer: EMAQuantizer, record: dict[str, Tensor], run: str, step: int) -> None:
    """The state after a step, where it is recorded."""
    for theirs, ours in BUFFERS.items():
        name = f"{run}.after{step}.{theirs}"
        if name in record:
            assert_near(getattr(quantizer, ours), record[name], name)


def test_codebook_follows_the_nearest_vectors(parity: Records) -> None:
    record = parity.tensors("vqvae/quantizer_train.safetensors")
    for run, num_steps in recorded_runs(parity, "nearest").items():
        # `fresh` starts at cluster_size 0, as the original does: its codes grow to ~1e5, and ours must follow.
        quantizer = ema_quantizer(record, run.split(".")[0]).train()
        for step in range(num_steps):
            at = f"{run}.step{step + 1}"
            x_ByxD = record[f"x{step}"].requires_grad_()
            distances = squared_distances(x_ByxD.flatten(0, 2), quantizer.codebook)
            assert_near(distances, record[f"{at}.distances"], f"{at}.distances")
            found = quantizer(channels_first(x_ByxD))
            quantized_ByxD = channels_last(found.quantized)
            assert torch.equal(found.codes, record[f"{at}.indices"]), at
            assert_near(quantized_ByxD, record[f"{at}.quantized"], f"{at}.quantized")
            assert_near(found.loss.reshape(1), record[f"{at}.diff"], f"{at}.diff")
            (of_diff,) = torch.autograd.grad(found.loss, x_ByxD)
            assert_near(of_diff, record[f"{at}.grad_x_of_diff"], f"{at}, gradient of diff")
            (of_quantized,) = torch.autograd.grad((quantized_ByxD * record["cotangent"]).sum(), x_ByxD)
            assert_near(of_quantized, record[f"{at}.grad_x_of_quantized"], f"{at}, gradient of quantized")
            assert_buffers(quantizer, record, run, step + 1)


# Relaxed choice


def relaxed_step(
    monkeypatch: pytest.MonkeyPatch, codebook_DK: Tensor, x_ByxD: Tensor, exponential_NK: Tensor, run: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantised vectors `(B, y, x, D)`, codes and unweighted divergence of our quantizer under the recorded noise."""
    _, mode, temperature = run.split(".", 2)
    codebook_dim, codebook_size = codebook_DK.shape
    tau = float(temperature.removeprefix("tau"))
    quantizer = make_quantizer(
        "gumbel",
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        hard=mode == "hard",
        kl_weight=1.0,
        temperature_start=tau,
        temperature_end=tau,
    ).train()
    with torch.no_grad():
        quantizer.codebook.copy_(codebook_DK)
    # The draw is torch's; its numbers are part of the record. The backward pass draws them again.
    monkeypatch.setattr(Tensor, "exponential_", lambda drawn: drawn.copy_(exponential_NK))
    found = quantizer(channels_first(x_ByxD))
    return channels_last(found.quantized), found.codes, found.loss


def test_soft_choice(parity: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    record = parity.tensors("vqvae/quantizer_train.safetensors")
    for run, num_steps in recorded_runs(parity, "soft").items():
        codebook_DK = record[f"{run.split('.')[0]}.start.embed"]  # the soft mode never updates it
        for step in range(num_steps):
            at = f"{run}.step{step + 1}"
            x_ByxD = record[f"x{step}"].requires_grad_()
            noise = record[f"{at}.exponential"]
            distances = squared_distances(x_ByxD.flatten(0, 2), codebook_DK)
            assert_near(distances, record[f"{at}.distances"], f"{at}.distances")
            quantized_ByxD, codes, divergence = relaxed_step(monkeypatch, codebook_DK, x_ByxD, noise, run)
            assert torch.equal(codes, record[f"{at}.indices"]), at
            assert_near(quantized_ByxD, record[f"{at}.quantized"], f"{at}.quantized")
            assert_near(divergence.reshape(1), record[f"{at}.diff"], f"{at}.diff")
            (of_diff,) = torch.autograd.grad(divergence, x_ByxD, retain_graph=True)
            assert_near(of_diff, record[f"{at}.grad_x_of_diff"], f"{at}, gradient of diff")
            (of_quantized,) = torch.autograd.grad((quantized_ByxD * record["cotangent"]).sum(), x_ByxD)
            assert_near(of_quantized, record[f"{at}.grad_x_of_quantized"], f"{at}, gradient of quantized")


def test_hard_choice(parity: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    # The original passes no gradient of the result to the encoder here; ours does, on purpose. Of the gradient of
    # the divergence it records both the true one and the one it got after overwriting the codebook.
    record = parity.tensors("vqvae/quantizer_train.safetensors")
    for run, num_steps in recorded_runs(parity, "hard").items():
        statistics = ema_quantizer(record, run.split(".")[0])  # the original moves the codebook in this mode, too
        for step in range(num_steps):
            at = f"{run}.step{step + 1}"
            x_ByxD = record[f"x{step}"].requires_grad_()
            noise, codebook_DK = record[f"{at}.exponential"], statistics.codebook
            distances = squared_distances(x_ByxD.flatten(0, 2), codebook_DK)
            assert_near(distances, record[f"{at}.distances"], f"{at}.distances")
            quantized_ByxD, codes, divergence = relaxed_step(monkeypatch, codebook_DK, x_ByxD, noise, run)
            assert torch.equal(codes, record[f"{at}.indices"]), at
            assert_near(quantized_ByxD, record[f"{at}.quantized"], f"{at}.quantized")
            assert_near(divergence.reshape(1), record[f"{at}.diff"], f"{at}.diff")
            (of_diff,) = torch.autograd.grad(divergence, x_ByxD)
            assert_near(of_diff, record[f"{at}.grad_x_of_diff_codebook_unchanged"], f"{at}, gradient of diff")
            counts_K, sums_KD = gather_statistics(x_ByxD.detach().flatten(0, 2), codes.flatten(), len(codebook_DK.T))
            statistics._update(counts_K, sums_KD)
            assert_buffers(statistics, record, run, step + 1)


def test_divergence_in_evaluation(parity: Records, model: VQVAE) -> None:
    record = parity.tensors("vqvae/train_forward.safetensors")
    latents = model.latents(to_images(model, record["images"])).detach()
    codebook_dim, codebook_size = record["embed_after"].shape
    for name, diff in record.items():
        if match := re.fullmatch(r"encode_diff\.relax\.hard(\d)\.KL(\d)", name):
            hard, kl_weight = bool(int(match[1])), float(match[2])
            quantizer = make_quantizer(
                "gumbel", codebook_size=codebook_size, codebook_dim=codebook_dim, hard=hard, kl_weight=kl_weight
            ).eval()
            with torch.no_grad():
                quantizer.codebook.copy_(record["embed_after"])
                assert_near(quantizer(latents).loss.reshape(1), diff, name)


# Reading images


def read_files(parity: Records) -> list[str]:
    return parity.json("vqvae/meta.json")["read_img"]["files"]


def test_codes_of_prepared_images(parity: Records, model: VQVAE) -> None:
    record = parity.tensors("vqvae/read_img.safetensors")
    for file in read_files(parity):
        images = to_images(model, record[f"{file}.tensor"])
        assert torch.equal(model.encode(images).flatten(1), record[f"{file}.codes"]), file


def test_opaque_images_are_cut_alike(parity: Records, model: VQVAE) -> None:
    # Ours resizes bicubically where the original is bilinear, and puts transparency on white where the original
    # drops the alpha channel; so pixels differ, but by far less than if the cut were off by half a pixel.
    record = parity.tensors("vqvae/read_img.safetensors")
    size = parity.json("vqvae/meta.json")["read_img"]["img_size"]
    for file in read_files(parity):
        with Image.open(parity / f"vqvae/{file}") as image:
            if image.has_transparency_data:
                continue
        theirs = to_images(model, record[f"{file}.tensor"])[0]
        ours = load_image(parity / f"vqvae/{file}", size) / 255
        for axis in (-1, -2):
            off = ((theirs + theirs.roll(1, axis)) / 2 - theirs).abs().mean()
            assert (ours - theirs).abs().mean() < off / 2, file
