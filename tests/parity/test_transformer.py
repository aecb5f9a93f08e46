"""The sequence model against the original: logits, hidden states, losses, gradients, and its parts one by one.

Shapes: B batch, L length, V vocabulary, U some ids of it, D hidden size, H heads, K head size.

Limits are a tenth of what the records ask for: absolute for values of ordinary size, relative to the largest recorded
value where a table was blown up or shrunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cogview_pl.checkpoints.released import load_transformer, save_transformer
from cogview_pl.transformer.attention import ATTENTIONS
from cogview_pl.transformer.block import MLP, Block, LayerNorm
from cogview_pl.transformer.hidden_state_cache import HiddenStateCache
from cogview_pl.transformer.loss import SequenceLoss, sequence_loss
from cogview_pl.transformer.model import Transformer

from .conftest import Records

CHUNK = 128  # positions whose logits are held at a time: all of them would be half a gigabyte
BATCH_DEPENDENCE_STRIDE = 17  # of the recorded logits
IMAGE, TEXT = 0, 1  # kinds of position, by the input token


def limit_of(recorded: Tensor, *, atol: float = 0.0, of_largest: float = 0.0) -> float:
    """`atol`, or a share of the largest recorded value."""
    return max(atol, of_largest * recorded.abs().max().item())


def assert_near(found: Tensor, recorded: Tensor, what: str, **limit: float) -> None:
    """Equal up to `limit_of`."""
    atol = limit_of(recorded, **limit)
    torch.testing.assert_close(found, recorded, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")


# The whole model


@pytest.fixture(scope="module")
def meta(parity: Records) -> dict[str, Any]:
    return parity.json("transformer/meta.json")


@pytest.fixture(scope="module")
def batch(parity: Records) -> dict[str, Tensor]:
    return parity.tensors("transformer/batch.safetensors")


@torch.no_grad()
def load(parity: Records, meta: Mapping[str, Any], table: str = "base", norm_scope: str = "tensor") -> Transformer:
    """The recorded model; `table` says what is done to its embeddings after loading."""
    heads = meta["config"]["num_attention_heads"]
    model = load_transformer(parity / "transformer/checkpoint", num_heads=heads, norm_scope=norm_scope)
    if table == "huge":
        model.token_embedding.weight.mul_(meta["huge_factor"])
    elif table == "tiny":
        model.token_embedding.weight.mul_(meta["tiny_factor"])
        model.position_embedding.weight.mul_(meta["tiny_factor"])
    elif table == "outlier":
        model.token_embedding.weight[meta["outlier"]["id"]].mul_(meta["outlier"]["factor"])
    return model


@torch.no_grad()
def hidden_states(model: Transformer, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Final hidden states `(B, L, D)`, and the residual stream before, between and after the blocks."""
    stream: list[Tensor] = []
    hooks = [model.blocks[0].register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0]))]
    hooks += [block.register_forward_hook(lambda _, __, output: stream.append(output)) for block in model.blocks]
    final_BLD = model.hidden(tokens, positions)
    for hook in hooks:
        hook.remove()
    return final_BLD, torch.stack(stream)


class Predictions(NamedTuple):
    """What is recorded of the logits, each `(B, L)`, and some of them."""

    cross_entropy: Tensor
    logsumexp: Tensor
    argmax: Tensor
    argmax_margin: Tensor
    logits_subset: Tensor


@torch.no_grad()
def predictions(model: Transformer, hidden_BLD: Tensor, labels_BL: Tensor, ids_U: Tensor) -> Predictions:
    parts = []
    for h_BLD, y_BL in zip(hidden_BLD.split(CHUNK, 1), labels_BL.split(CHUNK, 1), strict=True):
        logits_BLV = model.logits(h_BLD)
        logsumexp_BL = logits_BLV.logsumexp(-1)
        best_BL2, ids_BL2 = logits_BLV.topk(2, -1)
        entropy_BL = logsumexp_BL - logits_BLV.gather(-1, y_BL[..., None])[..., 0]
        margin_BL = best_BL2[..., 0] - best_BL2[..., 1]
        parts.append(Predictions(entropy_BL, logsumexp_BL, ids_BL2[..., 0], margin_BL, logits_BLV[..., ids_U]))
    return Predictions(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


class Limits(NamedTuple):
    """Keywords of `limit_of`."""

    logits: dict[str, float]
    """Logits and hidden states."""
    entropies: dict[str, float]
    """Cross-entropies and the logarithms of sums: differences of large numbers where logits are large."""
    margins: dict[str, float]
    """Distance of the best logit to the next."""


ORDINARY, RELATIVE, TIGHT = {"atol": 1e-4}, {"of_largest": 1e-5}, {"of_largest": 1e-6}
LIMITS = {
    "base": Limits(ORDINARY, ORDINARY, ORDINARY),
    "tiny": Limits(RELATIVE, ORDINARY, RELATIVE),  # its logits are ~0.02
    "huge": Limits(TIGHT, TIGHT, TIGHT),
    "outlier": Limits(ORDINARY, TIGHT, TIGHT),
}
FILES = {table: "outputs" if table == "base" else f"outputs_{table}" for table in LIMITS}


@pytest.mark.all_records
@pytest.mark.parametrize("table", LIMITS)
def test_outputs(parity: Records, meta: dict[str, Any], batch: dict[str, Tensor], table: str) -> None:
    base = parity.tensors("transformer/outputs.safetensors")
    record = parity.tensors(f"transformer/{FILES[table]}.safetensors")
    model = load(parity, meta, table)
    hidden_BLD, streams = hidden_states(model, batch["tokens"], batch["position_ids"])
    found = predictions(model, hidden_BLD, batch["labels"], base["vocab_subset"])

    limits = LIMITS[table]
    for layer, stream_BLD in enumerate(streams):
        recorded = record["hidden_subset"][layer]
        assert_near(stream_BLD[:, base["hidden_positions"]], recorded, f"stream after layer {layer}", **limits.logits)
    assert_near(found.logits_subset, record["logits_subset"], "logits", **limits.logits)
    if "positions" in record:
        logits = model.logits(hidden_BLD[:, record["positions"]]).detach()
        assert_near(logits, record["logits_at_positions"], "logits at positions", **limits.logits)
    assert_near(found.logsumexp, record["logsumexp"], "logsumexp", **limits.entropies)
    assert_near(found.cross_entropy, record["cross_entropy"], "cross-entropy", **limits.entropies)
    assert_near(found.argmax_margin, record["argmax_margin"], "margin", **limits.margins)
    other_winner = found.argmax != record["argmax"]
    assert (record["argmax_margin"][other_winner] <= limit_of(record["argmax_margin"], **limits.margins)).all()


@pytest.mark.all_records
def test_positions_count_from_zero(parity: Records, meta: dict[str, Any], batch: dict[str, Tensor]) -> None:
    model = load(parity, meta)
    counted, given = (hidden_states(model, batch["tokens"], ids)[0] for ids in (None, batch["position_ids"]))
    assert torch.equal(counted, given)


@pytest.mark.all_records
def test_a_row_depends_on_the_batch(parity: Records, meta: dict[str, Any], batch: dict[str, Tensor]) -> None:
    record = parity.tensors("transformer/batch_dependence.safetensors")
    ids_U = parity.tensors("transformer/outputs.safetensors")["vocab_subset"]
    model = load(parity, meta, "outlier")
    for name, rows in {"together": slice(None), "row1_alone": slice(1, 2)}.items():
        hidden_BLD, _ = hidden_states(model, record["tokens"][rows])
        found = predictions(model, hidden_BLD, batch["labels"][rows], ids_U)
        logits = found.logits_subset[:, ::BATCH_DEPENDENCE_STRIDE]
        assert_near(logits, record[f"logits_subset_{name}"], f"logits, {name}", **LIMITS["outlier"].logits)
        entropy = record[f"cross_entropy_{name}"]
        assert_near(found.cross_entropy, entropy, f"cross-entropy, {name}", **LIMITS["outlier"].entropies)


# Our default, the maximum per position


@pytest.mark.all_records
@pytest.mark.parametrize("table", ["base", "tiny", "huge"])
def test_maximum_per_position_is_the_same_model(
    parity: Records, meta: dict[str, Any], batch: dict[str, Tensor], table: str
) -> None:
    # Where positions are of similar size only eps sees the divisor: the limits are those of the records themselves.
    base = parity.tensors("transformer/outputs.safetensors")
    record = parity.tensors(f"transformer/{FILES[table]}.safetensors")
    model = load(parity, meta, table, norm_scope="token")
    hidden_BLD, streams = hidden_states(model, batch["tokens"], batch["position_ids"])
    limit = RELATIVE if table == "huge" else {"atol": 1e-3}
    for layer, stream_BLD in enumerate(streams):
        recorded = record["hidden_subset"][layer]
        assert_near(stream_BLD[:, base["hidden_positions"]], recorded, f"stream after layer {layer}", **limit)
    logits = model.logits(hidden_BLD, [range(id, id + 1) for id in base["vocab_subset"].tolist()]).detach()
    assert_near(logits, record["logits_subset"], "logits", **limit)


@pytest.mark.all_records
@pytest.mark.parametrize("table", ["huge", "tiny", "outlier"])
def test_maximum_per_position_stays_finite_and_within_its_row(
    parity: Records, meta: dict[str, Any], batch: dict[str, Tensor], table: str
) -> None:
    tokens = parity.tensors("transformer/batch_dependence.safetensors")["tokens"]
    model = load(parity, meta, table, norm_scope="token")
    together_BLD, _ = hidden_states(model, tokens)
    alone_BLD, _ = hidden_states(model, tokens[1:2])
    for h_BLD in together_BLD.split(CHUNK, 1):
        assert model.logits(h_BLD).isfinite().all()
    assert_near(alone_BLD, together_BLD[1:2], "row 1 alone", **RELATIVE)


# Losses and gradients


def loss(
    model: Transformer, batch: Mapping[str, Tensor], codebook_size: int, text_weight: float
) -> tuple[SequenceLoss, Tensor]:
    """Our loss under the original's weights, and these: it weighs a prediction by the kind of its input token."""
    image_BL = batch["tokens"] < codebook_size
    weights_BL = batch["loss_mask_shifted"] * torch.where(image_BL, 1.0, text_weight)
    slots_BL = torch.where(image_BL, IMAGE, TEXT)
    first = (len(image_BL), 1)  # the first token is not predicted
    weights_BL = torch.cat([torch.zeros(first), weights_BL], 1)
    slots_BL = torch.cat([torch.full(first, -1), slots_BL], 1)
    positions_BL = torch.arange(batch["text"].shape[1]).expand_as(batch["text"])
    return sequence_loss(model, batch["text"], positions_BL, weights_BL, slots_BL, num_slots=2), weights_BL


def assert_losses(found: SequenceLoss, recorded: Mapping[str, float], limit: Mapping[str, float]) -> None:
    means = found.slot_sums_S / found.slot_counts_S.clamp(min=1)
    for name, value in {"loss": found.loss.detach(), "img_loss": means[IMAGE], "txt_loss": means[TEXT]}.items():
        assert_near(value, torch.tensor(recorded[name]), name, **limit)


@pytest.mark.all_records
def test_recorded_batch_is_what_the_loss_takes(batch: dict[str, Tensor]) -> None:
    assert torch.equal(batch["text"][:, :-1], batch["tokens"])
    assert torch.equal(batch["text"][:, 1:], batch["labels"])
    assert torch.equal(batch["loss_mask"][:, 1:].float(), batch["loss_mask_shifted"])


@pytest.mark.all_records
@pytest.mark.parametrize("table", ["huge", "tiny", "outlier"])
def test_losses(parity: Records, meta: dict[str, Any], batch: dict[str, Tensor], table: str) -> None:
    with torch.no_grad():
        found, _ = loss(load(parity, meta, table), batch, meta["config"]["n_img"], text_weight=1.0)
    limit = {"atol": 1e-5} if table == "tiny" else TIGHT
    assert_losses(found, meta["losses"][table], limit)


def under_their_names(model: Transformer, folder: Path) -> dict[str, Tensor]:
    """Our tensors as the original would read them."""
    save_transformer(model, folder, iteration=1)
    return torch.load(folder / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]


@pytest.mark.all_records
def test_losses_and_gradients(parity: Records, meta: dict[str, Any], batch: dict[str, Tensor], tmp_path: Path) -> None:
    record = parity.tensors("transformer/grads.safetensors")
    rows = {"word_embeddings[rows]": record["word_rows"], "position_embeddings[rows]": record["position_rows"]}
    tables = {
        "word_embeddings[rows]": "word_embeddings",
        "position_embeddings[rows]": "transformer.position_embeddings",
    }
    prefix = "txt_loss_scale_"
    for scale in [name.removeprefix(prefix) for name in meta["losses"] if name.startswith(prefix)]:
        model = load(parity, meta)
        found, weights_BL = loss(model, batch, meta["config"]["n_img"], text_weight=float(scale))
        found.loss.backward()
        assert_losses(found, meta["losses"][f"{prefix}{scale}"], {"atol": 1e-5})
        counts = meta["losses"]["counts"]
        assert found.slot_counts_S.tolist() == [counts["image_positions"], counts["text_positions"]]
        assert weights_BL.count_nonzero() == counts["loss_mask_sum"]

        for parameter in model.parameters():
            parameter.data = parameter.grad
        gradients = under_their_names(model, tmp_path / scale)
        for name, recorded in record.items():
            of_scale, _, parameter_name = name.partition(".")
            if of_scale != f"scale{scale}":
                continue
            if parameter_name in rows:
                gradient = gradients[f"{tables[parameter_name]}.weight"][rows[parameter_name]]
            else:
                gradient = gradients[parameter_name.partition("[")[0]][: len(recorded)]  # matrices: the first rows
            assert_near(gradient, recorded, name, of_largest=1e-4)
        norms = {name: gradient.double().norm() for name, gradient in gradients.items()}
        norms["__total__"] = torch.stack(list(norms.values())).norm()
        recorded_norms = meta["gradient_norms"][f"{prefix}{scale}"]
        assert norms.keys() == recorded_norms.keys()
        for name, norm in norms.items():
            assert norm.item() == pytest.approx(recorded_norms[name], rel=1e-4), f"norm of {name}, text weight {scale}"


# Parts


@pytest.fixture(scope="module")
def units(parity: Records) -> dict[str, Tensor]:
    return parity.tensors("transformer/units.safetensors")


def test_layer_norm(units: dict[str, Tensor]) -> None:
    norm = LayerNorm(len(units["layernorm.weight"]), "tensor")
    norm.load_state_dict({kind: units[f"layernorm.{kind}"] for kind in ("weight", "bias")})
    x = units["layernorm.x"].clone().requires_grad_()
    y = norm(x)
    (y * units["layernorm.cotangent"]).sum().backward()
    found = {"y": y.detach(), "grad_x": x.grad, "grad_weight": norm.weight.grad, "grad_bias": norm.bias.grad}
    for name, value in found.items():
        assert value is not None
        assert_near(value, units[f"layernorm.{name}"], name, **RELATIVE)


@torch.no_grad()
def test_gelu(units: dict[str, Tensor]) -> None:
    mlp = MLP(1)  # with one hidden unit passed through, an MLP is its activation
    for linear in (mlp.up, mlp.down):
        linear.weight.zero_().view(-1)[0] = 1.0
        linear.bias.zero_()
    assert_near(mlp(units["gelu.x"][:, None])[:, 0], units["gelu.y"], "gelu", **RELATIVE)


@pytest.mark.parametrize("form", list(ATTENTIONS))
def test_attention(units: dict[str, Tensor], form: str) -> None:
    q_BHLK, k_BHLK, v_BHLK = (units[f"attention.{name}"] for name in "qkv")
    assert_near(ATTENTIONS[form](q_BHLK, k_BHLK, v_BHLK, None, 0.0), units["attention.out"], form, **RELATIVE)
    recorded = units["attention.out_with_memory"]
    new, length = recorded.shape[2], k_BHLK.shape[2]
    mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    found = ATTENTIONS[form](q_BHLK[:, :, -new:], k_BHLK, v_BHLK, mask, 0.0)
    assert_near(found, recorded, f"{form} with memory", **RELATIVE)


@pytest.mark.parametrize("form", list(ATTENTIONS))
def test_hidden_scores_never_leak(units: dict[str, Tensor], form: str) -> None:
    """The original hides at -10,000, so where real scores lie below that, its positions see later ones; not ours."""
    q_BHLK, k_BHLK, v_BHLK = (units[f"attention_extreme.{name}"] for name in "qkv")
    scores_BHLL = q_BHLK.double() @ k_BHLK.double().transpose(-2, -1) / math.sqrt(q_BHLK.shape[-1])
    visible_LL = torch.ones(scores_BHLL.shape[-2:], dtype=torch.float64).tril()
    finite_BHLL = scores_BHLL * visible_LL - 10000.0 * (1 - visible_LL)
    theirs, exact = (
        (masked.softmax(-1) @ v_BHLK.double()).float()
        for masked in (finite_BHLL, scores_BHLL.masked_fill(visible_LL == 0, -math.inf))
    )
    # float32 knows scores of this size so far and no farther; a leak is larger.
    rounding = {"of_largest": torch.finfo(torch.float32).eps * scores_BHLL.abs().max().item()}
    assert_near(theirs, units["attention_extreme.out"], "the original's rule", **rounding)
    assert_near(ATTENTIONS[form](q_BHLK, k_BHLK, v_BHLK, None, 0.0), exact, form, **rounding)
    assert (exact - theirs).abs().max() > limit_of(exact, **rounding)


def recorded_block(units: Mapping[str, Tensor], num_heads: int, folder: Path) -> Block:
    """The recorded layer, read as the only one of a model."""
    layer = {f"transformer.layers.0.{k.removeprefix('layer.')}": v for k, v in units.items() if k.startswith("layer.")}
    hidden_size = units["layer_io.hidden"].shape[-1]
    names = ["word_embeddings.weight", "transformer.position_embeddings.weight"]
    rest = {name: torch.zeros(1, hidden_size) for name in names}
    rest |= {f"transformer.final_layernorm.{kind}": torch.zeros(hidden_size) for kind in ("weight", "bias")}
    torch.save({"module": layer | rest}, folder / "layer.pt")
    block = load_transformer(folder / "layer.pt", num_heads=num_heads).blocks[0]
    assert isinstance(block, Block)
    return block


@torch.no_grad()
def test_layer(units: dict[str, Tensor], tmp_path: Path) -> None:
    # The number of heads is not recorded; no other one than the true one can give these numbers.
    x_BLD, recorded_BLD = units["layer_io.hidden"], units["layer_io.out_full"]
    hidden_size = x_BLD.shape[-1]
    blocks = [recorded_block(units, heads, tmp_path) for heads in range(1, hidden_size + 1) if hidden_size % heads == 0]
    block = min(blocks, key=lambda block: (block(x_BLD, None, None, 0) - recorded_BLD).abs().max().item())
    assert_near(block(x_BLD, None, None, 0), recorded_BLD, "layer", **RELATIVE)

    (name,) = (name for name in units if name.startswith("layer_io.out_last"))
    num_new = units[name].shape[1]
    memory = HiddenStateCache(1)
    for part_BLD in x_BLD.tensor_split([-num_new], 1):
        found_BLD = block(part_BLD, memory.mask(part_BLD.shape[1]), memory, 0)
    assert_near(found_BLD, units[name], "layer with memory", **RELATIVE)


@torch.no_grad()
def test_cross_entropy(units: dict[str, Tensor]) -> None:
    logits_LV, targets_L = units["cross_entropy.logits"].flatten(0, -2), units["cross_entropy.targets"].flatten()
    recorded_L = units["cross_entropy.loss"].flatten()
    length, size = logits_LV.shape
    # Without layers and norm, with one-hot token embeddings, the logits are what is added to them.
    model = Transformer(vocab_size=size, num_layers=0, hidden_size=size, num_heads=1, num_positions=length + 1)
    model.final_norm = torch.nn.Identity()  # type: ignore[assignment]
    tokens = torch.cat([targets_L.new_zeros(1), targets_L])
    model.token_embedding.weight.copy_(torch.eye(size))
    model.position_embedding.weight[:length] = logits_LV - torch.eye(size)[tokens[:-1]]
    weights, slots = torch.ones(1, length + 1), torch.arange(-1, length)[None]
    positions = torch.arange(length + 1)[None]
    found = sequence_loss(model, tokens[None], positions, weights, slots, num_slots=length)
    assert_near(found.slot_sums_S, recorded_L, "cross-entropy", **RELATIVE)
    assert_near(found.loss, recorded_L.mean(), "its mean", **RELATIVE)
