"""Released files by value: what the names in them mean, computed from the tensors alone, and what is written back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.checkpoints.released import (
    is_released,
    is_vqvae_file,
    load_transformer,
    load_vqvae,
    released_names,
    save_transformer,
    save_vqvae,
    vqvae_settings,
)
from cogview_pl.errors import UserError
from cogview_pl.transformer.config import NormScope
from tests.make_models import make_transformer, quantizer_options

RANK = "mp_rank_00_model_states.pt"
LATEST = "latest_checkpointed_iteration.txt"
MEAN, STD = [0.79093, 0.76271, 0.75340], [0.30379, 0.32279, 0.32800]  # in the original's data loader


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same random tensors whatever ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def tokenizer_state(hidden_size: int = 6, codebook_dim: int = 4, codebook_size: int = 10) -> dict[str, Tensor]:
    """Random tensors with the names and shapes of a released tokenizer."""
    shapes = {"enc_b.blocks.6": (codebook_dim, hidden_size, 1, 1), "dec.blocks.6": (3, hidden_size, 1, 1)}
    for layer in (0, 2, 4):
        shapes[f"enc_b.blocks.{layer}"] = (hidden_size, hidden_size if layer else 3, 4, 4)
        shapes[f"dec.blocks.{layer}"] = (hidden_size if layer else codebook_dim, hidden_size, 4, 4)
    state = {f"{name}.weight": torch.randn(shape) / 3 for name, shape in shapes.items()}
    outputs = {
        name: 3 if name == "dec.blocks.6" else codebook_dim if name == "enc_b.blocks.6" else hidden_size
        for name in shapes
    }
    state |= {f"{name}.bias": torch.randn(size) / 9 for name, size in outputs.items()}
    state["quantize_t.embed"] = torch.randn(codebook_dim, codebook_size)
    state["quantize_t.cluster_size"] = torch.rand(codebook_size)
    state["quantize_t.embed_avg"] = torch.randn(codebook_dim, codebook_size)
    return state


def encode(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Codes as the original computes them."""
    x = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    for layer in (0, 2, 4):
        name = f"enc_b.blocks.{layer}"
        x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2, padding=1).relu()
    x = F.conv2d(x, state["enc_b.blocks.6.weight"], state["enc_b.blocks.6.bias"])
    return torch.cdist(x.permute(0, 2, 3, 1), state["quantize_t.embed"].T).argmin(-1)


def decode(state: dict[str, Tensor], codes: Tensor) -> Tensor:
    """Images as the original computes them."""
    x = state["quantize_t.embed"].T[codes].permute(0, 3, 1, 2)
    for layer in (0, 2, 4):
        name = f"dec.blocks.{layer}"
        x = F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2, padding=1).relu()
    x = F.conv2d(x, state["dec.blocks.6.weight"], state["dec.blocks.6.bias"])
    return x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_tokenizer_codes_as_the_original(tmp_path: Path, prefix: str) -> None:
    state = tokenizer_state()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "tokenizer.pt")
    model = load_vqvae(tmp_path / "tokenizer.pt")
    images, codes = torch.rand(2, 3, 32, 16), torch.randint(10, (2, 3, 4))
    assert len(encode(state, images).unique()) > 3
    assert torch.equal(model.encode(images), encode(state, images))
    torch.testing.assert_close(model.decode(codes), decode(state, codes))
    assert not model.training
    assert torch.equal(model.quantizer.cluster_size, state["quantize_t.cluster_size"])
    assert torch.equal(model.quantizer.embed_avg, state["quantize_t.embed_avg"])
    assert vqvae_settings(model) == {
        **{"hidden_size": 6, "codebook_dim": 4, "codebook_size": 10, "downsampling": 8, "residual_blocks": 0},
        **{"mean": MEAN, "std": STD},
        "quantizer": quantizer_options("ema", kmeans_iters=0),
    }
    assert list(build_vqvae(vqvae_settings(model)).state_dict()) == list(model.state_dict())
    save_vqvae(model, tmp_path / "new" / "folder" / "back.pt")
    assert_same(torch.load(tmp_path / "new" / "folder" / "back.pt"), state)
    assert is_vqvae_file(tmp_path / "tokenizer.pt", "key")


def test_tokenizers_in_half_precision_become_float32(tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in tokenizer_state().items()}
    torch.save(halves, tmp_path / "tokenizer.pt")
    model = load_vqvae(tmp_path / "tokenizer.pt")
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert torch.equal(model.quantizer.codebook, halves["quantize_t.embed"].float())


@pytest.mark.parametrize("kind", ["cosine", "fsq"])
def test_projected_codes_do_not_go_into_released_files(tmp_path: Path, kind: str) -> None:
    settings = {"hidden_size": 6, "codebook_dim": 4, "codebook_size": 32, "downsampling": 8, "residual_blocks": 0}
    model = build_vqvae({**settings, "mean": MEAN, "std": STD, "quantizer": quantizer_options(kind)}).eval()
    with pytest.raises(UserError, match=r"^convert: the released tokenizer looks up latents as they are"):
        save_vqvae(model, tmp_path / "tokenizer.pt")
    assert not list(tmp_path.iterdir())


UPKEEP = {"decay": 0.9, "kmeans_iters": 2, "dead_threshold": 0.1, "revive_every": 5}


@pytest.mark.parametrize(
    ("kind", "upkeep"), [("learned", {}), ("fixed", {}), ("gumbel", {}), ("learned", UPKEEP), ("gumbel", UPKEEP)]
)
def test_tokenizers_with_another_quantizer_go_into_released_files(tmp_path: Path, kind: str, upkeep: dict) -> None:
    """The statistics that they lack are those of a codebook at rest; what only their training needs is left out."""
    settings = {"hidden_size": 6, "codebook_dim": 4, "codebook_size": 10, "downsampling": 8, "residual_blocks": 0}
    model = build_vqvae({**settings, "mean": MEAN, "std": STD, "quantizer": quantizer_options(kind, **upkeep)}).eval()
    if upkeep:
        model.quantizer.cluster_size.fill_(3.0)
    save_vqvae(model, tmp_path / "tokenizer.pt")
    save_vqvae(model, tmp_path / "tokenizer.pt")  # onto the file that is there
    saved = torch.load(tmp_path / "tokenizer.pt")
    assert set(saved) == set(tokenizer_state())
    assert torch.equal(saved["quantize_t.cluster_size"], torch.ones(10))
    assert torch.equal(saved["quantize_t.embed_avg"], saved["quantize_t.embed"])
    back, images = load_vqvae(tmp_path / "tokenizer.pt"), torch.rand(2, 3, 16, 16)
    assert torch.equal(back.encode(images), model.encode(images))
    assert torch.equal(back.decode(model.encode(images)), model.decode(model.encode(images)))


OTHERS = {
    "half of the pixels per code": ({"downsampling": 4}, "has image_tokenizer.downsampling=8"),
    "twice the pixels per code": ({"downsampling": 16}, "has image_tokenizer.downsampling=8"),
    "residual blocks": ({"residual_blocks": 1}, "and residual_blocks=0"),
    "mean": ({"mean": [0.5, 0.5, 0.25]}, "normalises with mean [0.79093, 0.76271, 0.7534]"),
    "std": ({"std": [0.5, 0.5, 0.25]}, "was trained with [0.5, 0.5, 0.25]"),
}


@pytest.mark.parametrize("change", OTHERS)
def test_tokenizers_that_the_original_cannot_read_are_not_written(tmp_path: Path, change: str) -> None:
    settings, words = OTHERS[change]
    released = {"hidden_size": 6, "codebook_dim": 4, "codebook_size": 10, "downsampling": 8, "residual_blocks": 0}
    model = build_vqvae({**released, "mean": MEAN, "std": STD, "quantizer": quantizer_options("ema"), **settings})
    with pytest.raises(UserError) as error:
        save_vqvae(model, tmp_path / "tokenizer.pt")
    assert str(error.value).startswith("convert: ") and words in str(error.value)
    assert list(tmp_path.iterdir()) == []


def transformer_state(layers: int = 2, hidden_size: int = 12, rows: int = 20, positions: int = 9) -> dict[str, Tensor]:
    """Random tensors with the names and shapes of a released transformer."""
    shapes = {"word_embeddings": (rows, hidden_size), "transformer.position_embeddings": (positions, hidden_size)}
    norms = ["transformer.final_layernorm"]
    for layer in range(layers):
        at = f"transformer.layers.{layer}."
        norms += [at + name for name in NORMS]
        shapes |= {
            at + "attention.query_key_value": (3 * hidden_size, hidden_size),
            at + "attention.dense": (hidden_size, hidden_size),
        }
        shapes |= {
            at + "mlp.dense_h_to_4h": (4 * hidden_size, hidden_size),
            at + "mlp.dense_4h_to_h": (hidden_size, 4 * hidden_size),
        }
    state = {f"{name}.weight": torch.randn(shape) / 3 for name, shape in shapes.items()}
    state |= {f"{name}.weight": 1 + torch.randn(hidden_size) / 3 for name in norms}
    biased = [*norms, *(name for name in shapes if "embeddings" not in name)]
    return state | {f"{name}.bias": torch.randn(len(state[f"{name}.weight"])) / 3 for name in biased}


NORMS = ("input_layernorm", "third_layernorm", "post_attention_layernorm", "fourth_layernorm")


def logits(state: dict[str, Tensor], tokens: Tensor, heads: int) -> Tensor:
    """Logits as the original computes them, from its tensors by their names."""

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(8 * x / x.abs().max(), x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = state["word_embeddings.weight"][tokens] + state["transformer.position_embeddings.weight"][: tokens.shape[1]]
    hidden = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
    for layer in range(sum("input_layernorm.weight" in name for name in state)):
        at = f"transformer.layers.{layer}."
        q, k, v = affine(norm(x, at + NORMS[0]), at + "attention.query_key_value").chunk(3, -1)
        split = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v)]
        scores = split[0] @ split[1].transpose(-1, -2) / math.sqrt(split[0].shape[-1])
        seen = scores.masked_fill(hidden, -math.inf).softmax(-1) @ split[2]
        x = x + norm(affine(seen.transpose(1, 2).flatten(2), at + "attention.dense"), at + NORMS[1])
        wide = F.gelu(affine(norm(x, at + NORMS[2]), at + "mlp.dense_h_to_4h"), approximate="tanh")
        x = x + norm(affine(wide, at + "mlp.dense_4h_to_h"), at + NORMS[3])
    return norm(x, "transformer.final_layernorm") @ state["word_embeddings.weight"].T


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"module": state}, folder / RANK)
    return folder


@pytest.mark.parametrize("heads", [1, 3])
def test_a_released_transformer_predicts_as_the_original(tmp_path: Path, heads: int) -> None:
    state, tokens = transformer_state(), torch.randint(20, (2, 7))
    model = load_transformer(write(tmp_path / "model", state), num_heads=heads)
    torch.testing.assert_close(model(tokens), logits(state, tokens, heads=heads), rtol=1e-4, atol=1e-4)
    assert (model.num_heads, model.num_positions, len(model.blocks), model.norm_scope) == (
        heads,
        9,
        2,
        NormScope.tensor,
    )
    assert not model.training and model.token_embedding.weight.shape == (20, 12)
    assert (
        load_transformer(tmp_path / "model", num_heads=heads, norm_scope=NormScope.token).norm_scope == NormScope.token
    )
    half = load_transformer(tmp_path / "model", num_heads=heads, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_transformer_goes_back_with_all_of_its_digits(tmp_path: Path) -> None:
    """In float16, as the released files, only where that loses nothing."""
    state = transformer_state()
    model = load_transformer(write(tmp_path / "model", state), num_heads=3)
    save_transformer(model, tmp_path / "new" / "out", iteration=70)
    save_transformer(model, tmp_path / "new" / "out", iteration=70)  # onto what is there
    assert (tmp_path / "new/out" / LATEST).read_text() == "70"
    saved = torch.load(tmp_path / "new/out/70" / RANK)
    assert saved["iteration"] == 70
    assert_same(saved["module"], state)
    for parameter in model.parameters():
        parameter.data = parameter.half().float()
    save_transformer(model, tmp_path / "half")
    assert (tmp_path / "half" / LATEST).read_text() == "1"
    assert_same(torch.load(tmp_path / "half/1" / RANK)["module"], {name: value.half() for name, value in state.items()})
    assert released_names(model)["blocks.1.mlp.up.bias"] == "transformer.layers.1.mlp.dense_h_to_4h.bias"


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_transformers_that_the_original_cannot_read_are_not_written(tmp_path: Path, norm: str) -> None:
    model = make_transformer(vocab_size=20, num_layers=1, hidden_size=12, num_heads=3, num_positions=9, norm=norm)
    with pytest.raises(UserError, match=r"convert: the original knows model\.norm=sandwich only"):
        save_transformer(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("layers", "hidden_size", "known"), [(48, 2560, True), (12, 1024, True), (12, 2560, False)])
def test_sizes_whose_heads_are_known(tmp_path: Path, layers: int, hidden_size: int, known: bool) -> None:
    """Those of the released transformer and of the original's small one; the file is refused for other shapes then."""
    state = {name: torch.zeros(1) for name in transformer_state(layers, hidden_size=1)}
    state["word_embeddings.weight"] = torch.zeros(1, hidden_size)
    state["transformer.position_embeddings.weight"] = torch.zeros(1, 1)
    with pytest.raises(UserError, match="shapes of a released model" if known else r"set model\.num_heads"):
        load_transformer(write(tmp_path, state))


def load_tokenizer_file(file: Path) -> dict[str, Tensor]:
    return dict(load_vqvae(file).state_dict())


def load_transformer_file(file: Path) -> dict[str, Tensor]:
    return dict(load_transformer(file, num_heads=3).state_dict())


@pytest.mark.parametrize("load", [load_tokenizer_file, load_transformer_file])
def test_models_do_not_change_with_the_file_that_they_came_from(
    tmp_path: Path, load: Callable[[Path], dict[str, Tensor]]
) -> None:
    file = tmp_path / RANK
    torch.save(tokenizer_state() if load is load_tokenizer_file else transformer_state(), file)
    found = load(file)
    before = {name: tensor.clone() for name, tensor in found.items()}
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert_same(found, before)
    assert found["encoder.0.weight" if "encoder.0.weight" in found else "final_norm.weight"].count_nonzero()


def test_what_is_taken_for_released(tmp_path: Path) -> None:
    for name in ("with_latest", "with_rank", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "with_latest" / LATEST).write_text("1")
    (tmp_path / "with_rank" / RANK).write_bytes(b"")
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "mp_rank_01_model_states.pt").write_text("")
    released = ["with_latest", "with_rank", "missing.pt", "missing.pth"]
    others = ["run", "missing", "missing.ckpt", f"with_latest/{LATEST}"]
    assert [name for name in released + others if is_released(tmp_path / name)] == released
    assert is_released(str(tmp_path / "with_rank"))
