"""The sequence model: initial values, parameter groups, the tied head, the weighted loss, the released size."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.transformer.block import Block
from cogview_pl.transformer.config import ActivationCheckpointing, NormScope
from cogview_pl.transformer.loss import sequence_loss
from cogview_pl.transformer.model import Transformer
from tests.composed import composed
from tests.make_models import make_config, make_transformer

VOCABULARY = 120
SLOTS = 3


def make(**changes: object) -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "num_layers": 3, "hidden_size": 32, "num_heads": 4, "num_positions": 20}
    return make_transformer(**{**sizes, **changes})  # type: ignore[arg-type]


class TestInitialValues:
    STD = 0.05

    @pytest.mark.parametrize("norm", ["pre", "post", "sandwich"])
    def test_of_every_parameter(self, norm: str) -> None:
        layers = 3
        model = make(num_layers=layers, hidden_size=64, norm=norm, init_std=self.STD)
        residual = self.STD / math.sqrt(2 * layers)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                writes = "attention.out" in name or "mlp.down" in name
                expected = residual if writes else self.STD
                deviations = 5 / math.sqrt(parameter.numel())  # five standard errors
                assert parameter.std().item() == pytest.approx(expected, rel=deviations), name
                assert abs(parameter.mean().item()) < deviations * expected, name
            else:
                is_gain = "norm" in name and name.endswith("weight")
                assert (parameter == (1.0 if is_gain else 0.0)).all(), name

    def test_left_out_it_is_the_model_of_the_paper(self) -> None:
        model = make(hidden_size=64)
        assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.dropout.p == model.blocks[0].attention.dropout == 0.0
        assert model.norm_scope == NormScope.token
        assert {name for name, module in model.blocks[0].named_modules() if type(module).__name__ == "LayerNorm"} == {
            f"{branch}_residual.norm_{place}" for branch in ("attention", "mlp") for place in ("in", "branch")
        }
        assert model.num_positions == 20

    @pytest.mark.parametrize(
        ("hidden_size", "std"), [(96, 0.102), (384, 0.051), (768, 0.036), (1088, 0.03), (2560, 0.02), (512, 0.044)]
    )
    def test_follows_from_the_hidden_size(self, hidden_size: int, std: float) -> None:
        sizes = {"num_layers": 1, "hidden_size": hidden_size, "num_heads": 1, "num_positions": 9}
        assert make_config(**sizes, init_std=None).weight_std == std
        assert make_config(**sizes, init_std=0.25).weight_std == 0.25
        model = make(num_layers=1, hidden_size=hidden_size, num_heads=1, init_std=None)
        assert torch.equal(
            model.position_embedding.weight,
            make(num_layers=1, hidden_size=hidden_size, num_heads=1, init_std=std).position_embedding.weight,
        )

    @pytest.mark.parametrize("name", ["tiny", "small", "base", "cogview_400m", "cogview_4b"])
    def test_every_shipped_size_derives_it(self, name: str) -> None:
        assert composed("task=pretrain", f"model={name}").model.init_std is None

    def test_kinds_in_a_block(self) -> None:
        kinds = {name.split(".", 2)[2] for name, _ in make().named_parameters() if name.startswith("blocks.")}
        matrices = {kind for kind in kinds if "norm" not in kind and kind.endswith("weight")}
        assert matrices == {"attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight"}
        gains = {kind for kind in kinds if "norm" in kind and kind.endswith("weight")}
        assert len(gains) == 4  # sandwich: before and after each branch
        assert len(kinds) == 2 * (len(matrices) + len(gains))


class TestBlock:
    """Each placement of the norms against the formula written out."""

    @pytest.mark.parametrize("norm", ["pre", "post", "sandwich"])
    @torch.no_grad()
    def test_equals_the_formula(self, norm: str) -> None:
        config = make_config(num_layers=1, hidden_size=32, num_heads=4, num_positions=20, norm=norm, norm_scope="none")
        block = Block(config).double().eval()
        torch.manual_seed(0)
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        weights = block.state_dict()

        def layer_norm(name: str, x: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]

        def linear(name: str, x: Tensor) -> Tensor:
            return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

        def attention(x: Tensor) -> Tensor:
            heads = [part.unflatten(-1, (4, 8)).transpose(-2, -3) for part in linear("attention.qkv", x).chunk(3, -1)]
            scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(8)
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ heads[2]
            return linear("attention.out", mixed.transpose(-2, -3).flatten(-2))

        def mlp(x: Tensor) -> Tensor:
            up = linear("mlp.up", x)
            gelu = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
            return linear("mlp.down", gelu)

        x = torch.randn(2, 6, 32, dtype=torch.float64)
        expected = x
        for name, branch in (("attention_residual", attention), ("mlp_residual", mlp)):
            if norm == "pre":
                expected = expected + branch(layer_norm(f"{name}.norm_in", expected))
            elif norm == "post":
                expected = layer_norm(f"{name}.norm_sum", expected + branch(expected))
            else:
                inner = branch(layer_norm(f"{name}.norm_in", expected))
                expected = expected + layer_norm(f"{name}.norm_branch", inner)
        torch.testing.assert_close(block(x, None, None, 0), expected, atol=1e-10, rtol=1e-10)

    def test_unless_asked_nothing_is_compiled_or_computed_twice(self) -> None:
        for block in make().blocks:
            assert (block.compiled, block.checkpointing) == (False, ActivationCheckpointing.none)


class TestParameters:
    def test_groups(self) -> None:
        model = make()
        matrices, tables, spared = model.parameter_groups()
        decayed = [*matrices, *tables]
        identities = [id(parameter) for parameter in (*decayed, *spared)]
        assert len(set(identities)) == len(identities)
        assert set(identities) == {id(parameter) for parameter in model.parameters()}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed)
        assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in spared)
        assert all("embedding" in names[id(p)] for p in tables)
        assert not any("embedding" in names[id(p)] for p in matrices)
        assert matrices
        assert spared

    def test_released_size(self) -> None:
        with torch.device("meta"):
            sizes = {"num_layers": 48, "hidden_size": 2560, "num_heads": 40, "num_positions": 1089}
            model = make_transformer(vocab_size=58240, **sizes)
        assert sum(parameter.numel() for parameter in model.parameters()) == 3_928_849_920

    @pytest.mark.parametrize(("hidden_size", "num_heads"), [(32, 5), (10, 4)])
    def test_width_that_heads_do_not_divide(self, hidden_size: int, num_heads: int) -> None:
        with pytest.raises(ValueError, match=f"hidden_size {hidden_size} .* num_heads {num_heads}"):
            make(hidden_size=hidden_size, num_heads=num_heads)

    @pytest.mark.parametrize("key", ["norm", "norm_scope", "attention"])
    def test_unknown_choice(self, key: str) -> None:
        with pytest.raises(ValueError, match=f"^{key} is 'other'$"):
            make(**{key: "other"})

    def test_form_of_the_training_pass(self) -> None:
        model = make()
        model.set_activation_checkpointing(ActivationCheckpointing.block, compiled=True)
        for block in model.blocks:
            assert (block.checkpointing, block.compiled) == (ActivationCheckpointing.block, True)
        model.set_activation_checkpointing(ActivationCheckpointing.none)
        for block in model.blocks:
            assert (block.checkpointing, block.compiled) == (ActivationCheckpointing.none, False)


class TestHead:
    def test_is_the_embedding_table(self) -> None:
        model = make().eval()
        hidden = torch.randn(2, 5, 32)
        torch.testing.assert_close(model.logits(hidden), hidden @ model.token_embedding.weight.T)
        tokens = torch.randint(VOCABULARY, (2, 5))
        torch.testing.assert_close(model(tokens), model.hidden(tokens) @ model.token_embedding.weight.T)

    @pytest.mark.parametrize("ids", [(range(0, 16),), (range(16, 50), range(110, 111)), (range(5, 6), range(0, 3))])
    def test_ranges_are_columns_of_the_full_logits(self, ids: tuple[range, ...]) -> None:
        model, hidden = make(), torch.randn(2, 5, 32)
        columns = [i for span in ids for i in span]
        torch.testing.assert_close(model.logits(hidden, ids), model.logits(hidden)[..., columns], atol=1e-6, rtol=1e-5)


def random_batch(batch: int = 3, length: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, positions, weights, slots; each slot has one weight, outside of slots the weight is 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
    slots = torch.randint(-1, SLOTS, (batch, length), generator=generator)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0])[slots]  # slot -1 takes the last
    return tokens, torch.arange(length).expand(batch, -1), weights, slots


def dense_loss(model: Transformer, tokens: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """The weighted loss, from logits of every position and logarithms of softmax written out."""
    logits = model(tokens, positions)
    total, norm = logits.new_zeros(()), 0.0
    for row in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            probability = logits[row, t - 1].exp() / logits[row, t - 1].exp().sum()
            total = total - weights[row, t] * probability[tokens[row, t]].log()
            norm += weights[row, t].item()
    return total / norm


class TestLoss:
    def test_value_and_gradient_equal_the_dense_form(self) -> None:
        model = make(init_std=0.1).double()
        tokens, positions, weights, slots = random_batch()
        weights = weights.double()
        found = sequence_loss(model, tokens, positions, weights, slots, SLOTS).loss
        expected = dense_loss(model, tokens, positions, weights)
        # Logits are rounded to fp32 for the loss.
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
        parameters = list(model.parameters())
        for (name, _), one, other in zip(
            model.named_parameters(),
            torch.autograd.grad(found, parameters),
            torch.autograd.grad(expected, parameters),
            strict=True,
        ):
            assert torch.allclose(one, other, atol=1e-6, rtol=1e-4), name

    def test_sums_and_counts_per_slot(self) -> None:
        model = make().eval()
        tokens, positions, weights, slots = random_batch()
        result = sequence_loss(model, tokens, positions, weights, slots, SLOTS)
        entropy = F.cross_entropy(model(tokens, positions)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        for slot in range(SLOTS):
            inside = slots[:, 1:] == slot
            assert result.slot_counts_S[slot] == inside.sum()
            torch.testing.assert_close(result.slot_sums_S[slot], entropy[inside].sum())

    def test_slots_with_ids_of_their_own(self) -> None:
        """As if the logits of all other ids were -inf; the gradient, too."""
        model = make(init_std=0.1).eval()
        ids = [range(0, 10), range(5, VOCABULARY), range(0, VOCABULARY)]
        tokens, positions, weights, slots = random_batch()
        for slot, span in enumerate(ids):
            inside = slots == slot
            tokens[inside] = tokens[inside] % len(span) + span.start
        found = sequence_loss(model, tokens, positions, weights, slots, SLOTS, ids)
        logits = model(tokens, positions)[:, :-1]
        for slot, span in enumerate(ids):
            others = torch.tensor([number not in span for number in range(VOCABULARY)])
            logits = logits.masked_fill((slots[:, 1:] == slot)[..., None] & others, float("-inf"))
        entropy = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        due = weights[:, 1:] > 0
        expected = (entropy * weights[:, 1:])[due].sum() / weights[:, 1:].sum()
        torch.testing.assert_close(found.loss, expected)
        for slot in range(SLOTS):
            torch.testing.assert_close(found.slot_sums_S[slot], entropy[(slots[:, 1:] == slot) & due].sum())
        parameters = list(model.parameters())
        for one, other in zip(
            torch.autograd.grad(found.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)

    def test_slot_that_is_absent_counts_nothing(self) -> None:
        tokens, positions, weights, slots = random_batch()
        result = sequence_loss(make(), tokens, positions, weights, slots, SLOTS + 2)
        assert result.slot_counts_S.tolist()[SLOTS:] == [0, 0]
        assert result.slot_sums_S.tolist()[SLOTS:] == [0.0, 0.0]

    def test_first_token_is_no_prediction(self) -> None:
        tokens, positions, weights, slots = random_batch()
        before = sequence_loss(make(), tokens, positions, weights, slots, SLOTS)
        weights, slots = weights.clone(), slots.clone()
        weights[:, 0], slots[:, 0] = 100.0, 0
        after = sequence_loss(make(), tokens, positions, weights, slots, SLOTS)
        torch.testing.assert_close(after.loss, before.loss)
        torch.testing.assert_close(after.slot_counts_S, before.slot_counts_S)

    def test_scale_of_the_weights_does_not_matter(self) -> None:
        tokens, positions, weights, slots = random_batch()
        one = sequence_loss(make(), tokens, positions, weights, slots, SLOTS)
        other = sequence_loss(make(), tokens, positions, 7 * weights, slots, SLOTS)
        torch.testing.assert_close(one.loss, other.loss)

    @pytest.mark.parametrize("filler", [0, VOCABULARY - 1])
    def test_padding_changes_nothing(self, filler: int) -> None:
        model = make()
        tokens, positions, weights, slots = random_batch()
        before = sequence_loss(model, tokens, positions, weights, slots, SLOTS)
        after = sequence_loss(
            model,
            F.pad(tokens, (0, 5), value=filler),
            F.pad(positions, (0, 5)),
            F.pad(weights, (0, 5)),
            F.pad(slots, (0, 5), value=-1),
            SLOTS,
        )
        for one, other in zip(after, before, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

    def test_sums_add_up_over_batches(self) -> None:
        model = make().eval()
        batch = random_batch(4)
        whole = sequence_loss(model, *batch, SLOTS)
        halves = []
        for rows in (slice(2), slice(2, 4)):
            tokens, positions, weights, slots = (column[rows] for column in batch)
            halves.append(sequence_loss(model, tokens, positions, weights, slots, SLOTS))
        torch.testing.assert_close(sum(half.slot_sums_S for half in halves), whole.slot_sums_S)
        torch.testing.assert_close(sum(half.slot_counts_S for half in halves), whole.slot_counts_S)
