"""Another project's image tokenizer through tokenize, pretrain and generate: VQModel of diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cogview_pl.checkpoints.model_folder import load_sequence_model
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.vqvae.external import trust_external

SOURCE = """
import torch


class Diffusers(torch.nn.Module):
    def __init__(self, codebook_size: int) -> None:
        from diffusers import VQModel

        super().__init__()
        self.codebook_size, self.downsampling = codebook_size, 8
        self.model = VQModel(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8] * 4,
            norm_num_groups=4,
            latent_channels=4,
            num_vq_embeddings=codebook_size,
        )

    def encode(self, images):
        latents = self.model.encode(2 * images - 1).latents
        codes = self.model.quantize(latents)[2][2]
        return codes.view(len(images), *latents.shape[-2:])

    def decode(self, codes):
        vectors = self.model.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, 4))
        return self.model.decode(vectors, force_not_quantize=True).sample / 2 + 0.5
"""
EXTERNAL = (
    "image_tokenizer=external",
    "image_tokenizer.image_size=64",
    "image_tokenizer.external._target_=my_tokenizer.Diffusers",
    "+image_tokenizer.external.codebook_size=48",
)
TINY = (
    *("trainer.max_steps=2", "trainer.val_check_interval=2", "threads=1", "data.train_size=24", "data.val_size=8"),
    *("data.batch_size=8", "text.vocab_size=400"),
)


@pytest.mark.slow
def test_diffusers_from_tokens_to_images(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "my_tokenizer.py").write_text(SOURCE)
    trained = ["image_tokenizer.external names a trained image tokenizer", "task=tokenize"]
    cli.refuse([(["task=vqvae", *EXTERNAL], trained)], tmp_path, tmp_path)
    cli.succeed(["task=tokenize", *EXTERNAL, *TINY, "run_dir=tokens"], tmp_path)
    cli.succeed(["task=pretrain", *EXTERNAL, *TINY, "data.token_store=tokens", "run_dir=model"], tmp_path)
    cli.succeed(["task=generate", *EXTERNAL, "init_from=model", "prompts=红", "run_dir=made", "threads=1"], tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    trust_external("my_tokenizer.Diffusers")
    model = load_sequence_model(tmp_path / "model")
    assert model.template.vocabulary.codebook_size == 48
    store = TokenStore.open(tmp_path / "tokens" / "token_store")
    assert store.header.codebook_size == 48 and store.header.image_tokenizer == model.image_tokenizer.identity
    codes = torch.stack([torch.as_tensor(store.split("train")[row][1]) for row in range(4)])
    assert codes.shape == (4, 8, 8) and codes.max() < 48
    decoded = model.image_tokenizer.model.decode(codes.long())
    assert decoded.shape == (4, 3, 64, 64) and decoded.isfinite().all()
    (line,) = (tmp_path / "made" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["prompt"] == "红"
    unnamed = ["names the image tokenizer 'my_tokenizer.Diffusers'", "image_tokenizer.external._target_"]
    cli.refuse([(["task=generate", "init_from=model", "prompts=红"], unnamed)], tmp_path, tmp_path)
