"""Caption losses against the original's post-selection scores."""

from __future__ import annotations

import pytest
import torch

from cogview_pl.checkpoints.released import load_transformer
from cogview_pl.generation.rerank import caption_log_likelihoods, caption_losses
from cogview_pl.vocab import Template, Vocabulary

from .conftest import Records

CHECKPOINTS = {
    "small": ("sampling/checkpoint", "sampling/meta.json"),
    "small_outlier": ("sampling/checkpoint", "sampling/meta.json"),
    "full": ("transformer/checkpoint", "transformer/meta.json"),
}
LIMIT = 1e-3


@pytest.mark.parametrize("name", ["small", "small_outlier", pytest.param("full", marks=pytest.mark.all_records)])
def test_scores(parity: Records, name: str) -> None:
    checkpoint, file = CHECKPOINTS[name]
    sizes = parity.json(file)["config"]
    vocabulary = Vocabulary(sizes["n_img"], sizes["n_text"])
    model = load_transformer(parity / checkpoint, num_heads=sizes["num_attention_heads"])
    meta = parity.json("rerank/meta.json")
    if name in meta and "factor" in meta[name]:
        with torch.no_grad():
            model.token_embedding.weight[meta[name]["id"]] *= meta[name]["factor"]
    records = parity.tensors("rerank/rerank.safetensors")
    rows = records[f"{name}.sequences"].tolist()
    start = rows[0].index(vocabulary.command("[ROI1]"))
    codes = torch.tensor([row[2 : start - 1] for row in rows])
    edge = int(codes.shape[1] ** 0.5)
    texts = [[token - vocabulary.text_tokens.start for token in row[start + 1 :]] for row in rows]
    layout = Template(
        f"[BASE] [BOI1] {{image:{edge}x{edge}}} [EOI1] [ROI1] {{text}}",
        target="text",
        loss={"text": 1.0},
        vocabulary=vocabulary,
        text_length=len(texts[0]),
    )
    codes = codes.view(len(rows), edge, edge)
    together, counts = caption_log_likelihoods(model, layout, texts, codes)
    assert (together - records[f"{name}.scores"].flatten()).abs().max() < LIMIT
    assert counts.tolist() == [len(text) for text in texts]
    alone = [caption_log_likelihoods(model, layout, [text], codes[i : i + 1])[0] for i, text in enumerate(texts)]
    assert (torch.cat(alone) - records[f"{name}.scores_one_by_one"].flatten()).abs().max() < LIMIT
    torch.testing.assert_close(caption_losses(model, layout, texts, codes), -together / counts)
