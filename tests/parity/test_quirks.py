"""The quirks of the original that `compat: official` reproduces, one test each; by default none of them is on.

The position of the restart token in sampling is tested in test_generation.py, the scope of LayerNorm's maximum in
test_transformer.py.
"""

from __future__ import annotations

import hydra
import pytest
import torch
from omegaconf import DictConfig

from cogview_pl.checkpoints.released import load_transformer
from cogview_pl.config.schema import register_schemas
from cogview_pl.transformer.loss import sequence_loss
from cogview_pl.vocab import Template, Vocabulary

from .conftest import Records

CONF = "../../conf"


def compose(*overrides: str) -> DictConfig:
    register_schemas()
    with hydra.initialize(version_base="1.3", config_path=CONF):
        return hydra.compose("config", overrides=["task=pretrain", *overrides])


def test_one_switch_turns_them_on() -> None:
    sound, official = compose(), compose("compat=official")
    assert sound.model.norm_scope.value == "token" and official.model.norm_scope.value == "tensor"
    assert not any((sound.compat.loss_by_input, sound.compat.restart_after_token))
    assert official.compat.loss_by_input and official.compat.restart_after_token


def test_captions_have_no_end_token() -> None:
    assert compose("template=image_text").template.layout.endswith("{text} [SEP]")
    assert compose("template=image_text", "compat=official").template.layout.strip().endswith("{text}")


def test_all_windows_of_super_resolution_carry_the_same_position_token() -> None:
    for compat in ("none", "official"):
        layout = compose("template=super_resolution", f"compat={compat}").template.layout
        assert "[POS0]" in layout and layout.count("[POS") == 1


@pytest.mark.all_records
@pytest.mark.parametrize("text_weight", [1, 5])
def test_loss_weight_follows_the_input_token(parity: Records, text_weight: int) -> None:
    sizes = parity.json("transformer/meta.json")["config"]
    recorded = parity.json("transformer/meta.json")["losses"][f"txt_loss_scale_{text_weight}"]
    vocabulary = Vocabulary(sizes["n_img"], sizes["n_text"])
    rows, mask = (parity.tensors("transformer/batch.safetensors")[name] for name in ("text", "loss_mask"))
    model = load_transformer(parity / "transformer/checkpoint", num_heads=sizes["num_attention_heads"])
    end = vocabulary.command("[EOI1]")
    sequences, by_target = [], []
    for row, real in zip(rows.tolist(), mask.bool(), strict=True):
        tokens = [token for token, kept in zip(row, real.tolist(), strict=True) if kept]
        text_tokens = [token - vocabulary.text_tokens.start for token in tokens if token in vocabulary.text_tokens]
        codes = [token for token in tokens if token in vocabulary.codes]
        codes += [0] * (1024 - len(codes))  # the original cuts rows that are too long
        for found, by_input in ((sequences, True), (by_target, False)):
            layout = Template(
                "[ROI1] {text} [BASE] [BOI1] {image:32x32} [EOI1]",
                target="image",
                loss={"text": float(text_weight), "image": 1.0},
                vocabulary=vocabulary,
                text_length=64,
                loss_by_input=by_input,
            )
            built = layout.build({"text": text_tokens, "image": codes})
            assert built.tokens[: len(tokens)].tolist() == tokens
            found.append((built, len(tokens)))
    assert end in rows[0].tolist() or int(mask[0].sum()) == len(rows[0])
    length = rows.shape[1]
    weights, slots = torch.zeros(rows.shape), torch.full(rows.shape, -1)
    for index, (built, kept) in enumerate(sequences):
        weights[index, :kept] = torch.from_numpy(built.weights[:kept])
        slots[index, :kept] = torch.from_numpy(built.slots[:kept])
    positions = torch.arange(length).expand_as(rows)
    with torch.inference_mode():
        result = sequence_loss(model, rows, positions, weights, slots, num_slots=2)
    limit = 1e-5 * recorded["loss"]
    assert abs(float(result.loss) - recorded["loss"]) < limit
    text, image = (result.slot_sums_S / result.slot_counts_S).tolist()
    assert abs(image - recorded["img_loss"]) < limit and abs(text - recorded["txt_loss"]) < limit
    assert (by_target[0][0].weights != sequences[0][0].weights).any()  # by default weights follow the predicted token
