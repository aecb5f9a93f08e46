"""The shipped sizes are the released architecture, to the last name and shape; checked on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogview_pl.assembly.model_specs import transformer_settings, vqvae_settings
from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.checkpoints.released import released_names, save_vqvae
from cogview_pl.vocab import Vocabulary
from tests.make_models import make_transformer

from ..composed import composed


def released_shapes(layers: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released transformer, as the README of the records lists them."""
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (58240, hidden_size),
        "transformer.position_embeddings.weight": (1089, hidden_size),
    }
    linear = {
        "attention.query_key_value": (3 * hidden_size, hidden_size),
        "attention.dense": (hidden_size, hidden_size),
        "mlp.dense_h_to_4h": (4 * hidden_size, hidden_size),
        "mlp.dense_4h_to_h": (hidden_size, 4 * hidden_size),
    }
    norms = ("input_layernorm", "post_attention_layernorm", "third_layernorm", "fourth_layernorm")
    for layer in range(layers):
        prefix = f"transformer.layers.{layer}."
        for name, shape in linear.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
        for name in norms:
            shapes |= {f"{prefix}{name}.weight": (hidden_size,), f"{prefix}{name}.bias": (hidden_size,)}
    return shapes | {f"transformer.final_layernorm.{kind}": (hidden_size,) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    "name, layers, hidden_size, parameters",
    [("cogview_4b", 48, 2560, 3_928_849_920), ("cogview_400m", 24, 1088, 405_914_304)],
)
def test_transformer(name: str, layers: int, hidden_size: int, parameters: int) -> None:
    config = composed("task=pretrain", f"model={name}")
    vocabulary = Vocabulary(config.image_tokenizer.codebook_size, config.text.vocab_size)
    with torch.device("meta"):
        model = make_transformer(**transformer_settings(config.model, vocabulary))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert config.model.num_heads * 64 == hidden_size
    state = model.state_dict()
    found = {theirs: tuple(state[ours].shape) for ours, theirs in released_names(model).items()}
    assert found == released_shapes(layers, hidden_size)


def test_image_tokenizer(tmp_path: Path) -> None:
    model = build_vqvae(vqvae_settings(composed("task=pretrain", "model=cogview_4b").image_tokenizer))
    save_vqvae(model, tmp_path / "tokenizer.pt")
    found = {name: tuple(tensor.shape) for name, tensor in torch.load(tmp_path / "tokenizer.pt").items()}
    hidden_size, codebook_dim, codebook_size = 512, 256, 8192
    wanted = {
        "enc_b.blocks.0": (hidden_size, 3, 4, 4),
        "enc_b.blocks.2": (hidden_size, hidden_size, 4, 4),
        "enc_b.blocks.4": (hidden_size, hidden_size, 4, 4),
        "enc_b.blocks.6": (codebook_dim, hidden_size, 1, 1),
        "dec.blocks.0": (codebook_dim, hidden_size, 4, 4),
        "dec.blocks.2": (hidden_size, hidden_size, 4, 4),
        "dec.blocks.4": (hidden_size, hidden_size, 4, 4),
        "dec.blocks.6": (3, hidden_size, 1, 1),
    }
    for name, shape in wanted.items():
        assert found.pop(f"{name}.weight") == shape
        assert found.pop(f"{name}.bias") == (shape[1] if name.startswith("dec") and shape[2] == 4 else shape[0],)
    assert found == {
        "quantize_t.embed": (codebook_dim, codebook_size),
        "quantize_t.cluster_size": (codebook_size,),
        "quantize_t.embed_avg": (codebook_dim, codebook_size),
    }
