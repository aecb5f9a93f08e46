"""Sparse attention for training against records of the original, and what holds for it in general."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.checkpoints.official import load_transformer, save_transformer
from cogview_pl.transformer import Transformer
from cogview_pl.transformer.attention import fused_attention
from cogview_pl.transformer.sparse import SparseAttention, draw_pivots

from .conftest import Records

RUNS = ("one_layer_chunks", "two_layer_chunks")


def visible(pivots_BP: Tensor, length: int, window: int, num_windows: int) -> Tensor:
    """Whom every query sees, bool `(B, 1, L, L)`, from the definition: near keys, and pivots before them."""
    places = torch.arange(length)
    start_L1 = (places // window - num_windows + 1).mul(window)[:, None]
    near_LL = (places >= start_L1) & (places <= places[:, None])
    is_pivot_BL = torch.zeros(len(pivots_BP), length, dtype=torch.bool).scatter_(1, pivots_BP, True)
    return (near_LL | ((places < start_L1) & is_pivot_BL[:, None]))[:, None]


def assert_gradients_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


@pytest.mark.all_records
class TestRecordedCalls:
    def test_outputs(self, parity: Records) -> None:
        records = parity.tensors("sparse/attention.safetensors")
        for index, sizes in enumerate(parity.json("sparse/meta.json")["units"]):
            q, k, v, pivots, out = (records[f"unit{index}.{name}"] for name in ("q", "k", "v", "pivot_idx", "out"))
            attend = SparseAttention(pivots, window=sizes["query_window"], num_windows=sizes["key_window_times"])
            torch.testing.assert_close(attend(q, k, v, None, 0.0), out, atol=1e-5, rtol=0)

    def test_gradients(self, parity: Records) -> None:
        records = parity.tensors("sparse/attention.safetensors")
        units = parity.json("sparse/meta.json")["units"]
        differentiated = [index for index in range(len(units)) if f"unit{index}.cotangent" in records]
        assert differentiated
        for index in differentiated:
            window, num_windows = units[index]["query_window"], units[index]["key_window_times"]
            inputs = [records[f"unit{index}.{name}"].requires_grad_() for name in "qkv"]
            attend = SparseAttention(records[f"unit{index}.pivot_idx"], window=window, num_windows=num_windows)
            found = torch.autograd.grad(attend(*inputs, None, 0.0), inputs, records[f"unit{index}.cotangent"])
            for name, gradient in zip("qkv", found, strict=True):
                assert_gradients_close(gradient, records[f"unit{index}.grad_{name}"])

    def test_pivots_seen(self, parity: Records) -> None:
        """Values that are the rows of the identity bring the attention weights to light."""
        records = parity.tensors("sparse/attention.safetensors")
        for index, sizes in enumerate(parity.json("sparse/meta.json")["units"]):
            q, k, pivots, seen = (records[f"unit{index}.{name}"] for name in ("q", "k", "pivot_idx", "pivot_mask"))
            window, num_windows, length = sizes["query_window"], sizes["key_window_times"], sizes["s"]
            attend = SparseAttention(pivots, window=window, num_windows=num_windows)
            weights = attend(q, k, torch.eye(length).expand(*k.shape[:2], -1, -1), None, 0.0)
            is_seen = visible(pivots, length, window, num_windows)
            assert torch.equal(weights > 0, is_seen.expand_as(weights))
            far = pivots[:, None] < (torch.arange(length) // window - num_windows + 1).mul(window)[:, None]
            assert torch.equal(far, seen.bool())


def released_model(parity: Records) -> Transformer:
    heads = parity.json("sampling/meta.json")["config"]["num_attention_heads"]
    folder = parity / parity.json("sparse/meta.json")["model"]["checkpoint"]
    return load_transformer(folder, num_heads=heads, norm_scope="tensor")


def original_loss(cross_entropy: Tensor, mask: Tensor, is_image: Tensor, text_weight: float) -> Tensor:
    """The original weighs a prediction by the token it is made from, not by the token it predicts."""
    weights = torch.where(is_image, mask, mask * text_weight)
    return (weights * cross_entropy).sum() / weights.sum()


@pytest.mark.all_records
@pytest.mark.parametrize("run", RUNS)
class TestRecordedModel:
    def test_logits_loss_and_gradients(self, parity: Records, run: str, tmp_path: Path) -> None:
        records = parity.tensors("sparse/model.safetensors")
        meta = parity.json("sparse/meta.json")
        sizes, expected = meta["model"], meta["runs"][run]
        model = released_model(parity)
        attentions = [
            SparseAttention(pivots, window=sizes["query_window"], num_windows=sizes["key_window_times"])
            for pivots in records[f"{run}.pivot_idx"]
        ]
        tokens, labels = records["text"][:, :-1], records["text"][:, 1:]
        mask = records["loss_mask"][:, 1:].float()
        is_image = tokens < parity.json("sampling/meta.json")["config"]["n_img"]

        logits = model.logits(model.hidden(tokens, attentions=attentions))
        entropy = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss = original_loss(entropy, mask, is_image, expected["txt_loss_scale"])
        loss.backward()

        torch.testing.assert_close(logits[:, ::4], records[f"{run}.logits_every4"], atol=1e-3, rtol=0)
        torch.testing.assert_close(entropy, records[f"{run}.cross_entropy"], atol=1e-3, rtol=0)
        torch.testing.assert_close(loss, records[f"{run}.loss"][0], atol=1e-4, rtol=0)
        gradients = released_names(model, tmp_path)
        for name, gradient in gradients.items():
            assert gradient.double().norm().item() == pytest.approx(expected["gradient_norms"][name], rel=1e-3), name
            if (recorded := records.get(f"{run}.grad.{name}")) is not None:
                assert_gradients_close(gradient, recorded)

    def test_recorded_pivots_are_draws(self, parity: Records, run: str) -> None:
        """The masks that `draw_pivots` asks for, from tokens; what was drawn from them keeps its promises."""
        records = parity.tensors("sparse/model.safetensors")
        tokens, mask = records["text"][:, :-1], records["loss_mask"][:, 1:].bool()
        is_image = tokens < parity.json("sampling/meta.json")["config"]["n_img"]
        is_text = ~is_image & mask
        assert torch.equal(is_text, records["text_positions"].bool())
        assert torch.equal(is_image, records["image_positions"].bool())
        for pivots in records[f"{run}.pivot_idx"]:
            for found in (pivots, draw_pivots(is_text, is_image, pivots.shape[1])):
                assert_is_draw(found, is_text, is_image)


def released_names(model: Transformer, folder: Path) -> dict[str, Tensor]:
    """The gradients of a model under the names of released files."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    save_transformer(model, folder)
    (file,) = folder.glob("*/*.pt")
    return torch.load(file, weights_only=True)["module"]


@pytest.mark.all_records
def test_dense_attention_of_the_same_model(parity: Records) -> None:
    records = parity.tensors("sparse/model.safetensors")
    logits = released_model(parity)(records["text"][:, :-1])
    torch.testing.assert_close(logits[:, ::4], records["dense.logits_every4"], atol=1e-3, rtol=0)


def assert_is_draw(pivots_BP: Tensor, text_BL: Tensor, image_BL: Tensor) -> None:
    """All text positions, otherwise image positions, none of them twice."""
    for pivots, text, image in zip(pivots_BP, text_BL, image_BL, strict=True):
        drawn = set(pivots.tolist())
        texts, images = (set(places.nonzero().flatten().tolist()) for places in (text, image))
        assert len(drawn) == len(pivots)
        assert texts <= drawn <= texts | images


LENGTH, WINDOW, HEAD_SIZE = 24, 4, 8


def random_inputs(batch: int = 2, heads: int = 3, length: int = LENGTH) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, heads, length, HEAD_SIZE, requires_grad=True) for _ in range(3)]


def random_pivots(num_pivots: int, batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.rand(batch, length).argsort(-1)[:, :num_pivots]


class TestGeneral:
    @pytest.mark.parametrize("num_pivots", [1, 7, LENGTH])
    def test_windows_over_the_whole_sequence_equal_dense_attention(self, num_pivots: int) -> None:
        inputs = random_inputs()
        attend = SparseAttention(random_pivots(num_pivots), window=WINDOW, num_windows=LENGTH // WINDOW)
        sparse, dense = attend(*inputs, None, 0.0), fused_attention(*inputs, None, 0.0)
        torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=0)
        cotangent = torch.randn_like(dense)
        for one, other in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (sparse, dense)), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)

    def test_all_positions_as_pivots_equal_dense_attention(self) -> None:
        """With L = P the bonus is log 1, and what the windows leave out the pivots bring back."""
        inputs = random_inputs()
        attend = SparseAttention(random_pivots(LENGTH), window=WINDOW, num_windows=2)
        dense = fused_attention(*inputs, None, 0.0)
        torch.testing.assert_close(attend(*inputs, None, 0.0), dense, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("num_windows", [1, 3, 9])
    def test_a_query_depends_on_what_it_sees_and_on_nothing_else(self, num_windows: int) -> None:
        inputs, pivots = random_inputs(), random_pivots(5)
        y = SparseAttention(pivots, window=WINDOW, num_windows=num_windows)(*inputs, None, 0.0)
        is_seen = visible(pivots, LENGTH, WINDOW, num_windows)
        for query in range(LENGTH):
            gradients = torch.autograd.grad(y[:, :, query].square().sum(), inputs, retain_graph=True)
            queries, keys, values = (gradient.abs().sum(-1) > 0 for gradient in gradients)
            assert torch.equal(values, is_seen[:, :, query].expand_as(values))
            assert not (keys & ~is_seen[:, :, query]).any()
            assert not queries[..., torch.arange(LENGTH) != query].any()

    def test_a_model_stays_causal(self) -> None:
        torch.manual_seed(0)
        model = Transformer(vocabulary_size=50, num_layers=3, width=16, num_heads=2, num_positions=LENGTH, init_std=0.3)
        attentions = [SparseAttention(random_pivots(6, 1), window=WINDOW, num_windows=2) for _ in model.blocks]
        tokens = torch.arange(LENGTH)[None]  # each once, so that a row of the table stands for a position
        hidden = model.hidden(tokens, attentions=attentions)
        for query in range(LENGTH):
            (table,) = torch.autograd.grad(
                hidden[0, query].square().sum(), model.token_embedding.weight, retain_graph=True
            )
            assert table[query].abs().max() > 0
            assert not table[query + 1 :].any()

    def test_one_attention_per_block(self) -> None:
        model = Transformer(vocabulary_size=50, num_layers=3, width=16, num_heads=2, num_positions=LENGTH)
        with pytest.raises(ValueError, match="shorter"):
            model.hidden(torch.zeros(1, LENGTH, dtype=torch.long), attentions=[fused_attention] * 2)


class TestErrors:
    def test_length_that_the_window_does_not_divide(self) -> None:
        attend = SparseAttention(random_pivots(5), window=WINDOW, num_windows=2)
        with pytest.raises(ValueError, match=f"length {LENGTH - 2} is not a multiple of the window, {WINDOW}"):
            attend(*random_inputs(length=LENGTH - 2), None, 0.0)

    def test_length_below_the_number_of_pivots(self) -> None:
        attend = SparseAttention(random_pivots(9), window=WINDOW, num_windows=2)
        with pytest.raises(ValueError, match="length 8 is smaller than the number of pivots, 9"):
            attend(*random_inputs(length=8), None, 0.0)

    def test_mask(self) -> None:
        attend = SparseAttention(random_pivots(5), window=WINDOW, num_windows=2)
        with pytest.raises(ValueError, match="whole sequences"):
            attend(*random_inputs(), torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 0.0)

    @pytest.mark.parametrize(("window", "num_windows"), [(0, 2), (4, 0)])
    def test_no_window(self, window: int, num_windows: int) -> None:
        with pytest.raises(ValueError, match=f"positive, got {window} and {num_windows}"):
            SparseAttention(random_pivots(5), window=window, num_windows=num_windows)


class TestDraws:
    TEXT = torch.arange(LENGTH) < torch.tensor([[3], [8]])
    IMAGE = (torch.arange(LENGTH) >= 8) & (torch.arange(LENGTH) < 20)

    def draw(self, num_pivots: int, seed: int) -> Tensor:
        image = self.IMAGE.expand(2, -1)
        return draw_pivots(self.TEXT, image, num_pivots, torch.Generator().manual_seed(seed))

    @pytest.mark.parametrize("num_pivots", [8, 12, 15])
    def test_text_and_a_sample_of_the_image(self, num_pivots: int) -> None:
        for seed in range(20):
            assert_is_draw(self.draw(num_pivots, seed), self.TEXT, self.IMAGE.expand(2, -1))

    def test_follow_the_generator(self) -> None:
        assert torch.equal(self.draw(12, 0), self.draw(12, 0))
        assert not torch.equal(self.draw(12, 0), self.draw(12, 1))

    def test_every_image_position_is_drawn_equally_often(self) -> None:
        draws, num_pivots, num_text, num_image = 2000, 9, 3, 12
        text, image = self.TEXT[:1].expand(draws, -1), self.IMAGE.expand(draws, -1)
        pivots = draw_pivots(text, image, num_pivots, torch.Generator().manual_seed(0))
        share = pivots.flatten().bincount(minlength=LENGTH)[self.IMAGE] / draws
        expected = torch.full_like(share, (num_pivots - num_text) / num_image)
        torch.testing.assert_close(share, expected, atol=0.05, rtol=0)

    @pytest.mark.parametrize("num_pivots", [7, 16])
    def test_rows_that_do_not_fit(self, num_pivots: int) -> None:
        with pytest.raises(ValueError, match=f"{num_pivots} pivots: .* up to 8 text .* down to 15 text and image"):
            self.draw(num_pivots, 0)
