"""Steps on fixed memory, as CUDA graphs replay them, give the codes of `decode`; run here without a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cogview_pl.generation.config import Engine, Sampling
from cogview_pl.generation.decode import TO_SAMPLE, decode, uniforms
from cogview_pl.generation.engine.cuda_graph import Capture, Step, can_capture, graphed_steps, spans
from cogview_pl.generation.engine.decode_state import DecodeState
from cogview_pl.generation.sampling import probabilities, sample
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template
from tests.make_models import make_transformer

from ..recorder import recorded
from ..small_model import TWO_IMAGES, VOCABULARY, small_model

TEMPLATE = Template(
    "[ROI1] {text} [BASE] [BOI1] {image:5x5} [EOI1]", target="image", loss={}, vocabulary=VOCABULARY, text_length=8
)
TEXTS: tuple[list[int], ...] = ([3, 1, 4, 1, 5], [], [9, 2, 6, 5, 3, 5, 8, 9], [7])
EQUALLY_LONG: tuple[list[int], ...] = ([3, 1], [4, 1], [5, 9])
SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "sampled": Sampling(),
    "filtered": Sampling(temperature=1.4, top_k=11, top_p=0.8),
    "guided": Sampling(guidance=3.0, top_k=9),
    "guided_greedy": Sampling(temperature=0, guidance=2.0),
}


def as_it_is(step: Step) -> Step:
    return step


@torch.no_grad()  # in inference mode the recorder would see composite operations
def by_static_steps(
    model: Transformer,
    template: Template,
    texts: tuple[list[int], ...],
    sampling: Sampling,
    width: int,
    capture: Capture = as_it_is,
) -> list[list[int]]:
    prompts = prompts_of(template, texts)
    length, span = template.target.length, template.allowed(template.target)[0]
    uniform_BT, ids_n = uniforms(range(len(texts)), prompts, length), torch.arange(span.start, span.stop)
    by_torch = replace(sampling, engine=Engine.torch)  # a GPU has no other
    state, hidden_BD = DecodeState.after_prompts(
        model, template, prompts, without_text(template, texts), length, by_torch
    )
    tokens_BT = torch.full((len(texts), length), TO_SAMPLE)
    tokens_BT[:, 0] = ids_n[sample(probabilities(state.logits(hidden_BD), sampling), uniform_BT[:, 0])]
    steps = graphed_steps(state, tokens_BT, uniform_BT, ids_n, sampling, capture=capture, width=width)
    assert len(steps) == length - 1
    for step in steps:
        step()
    return tokens_BT.tolist()


def prompts_of(template: Template, texts: tuple[list[int], ...]) -> list[list[int]]:
    return [template.prompt({"text": text, "small": [1, 2, 3, len(text)]}) for text in texts]


def without_text(template: Template, texts: tuple[list[int], ...]) -> list[list[int]]:
    return prompts_of(template, ([],) * len(texts))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("width", [8, 256], ids=["several_graphs", "one_graph"])
@pytest.mark.parametrize("texts", [TEXTS, EQUALLY_LONG, TEXTS[:1]], ids=["lengths_differ", "equally_long", "one_row"])
def test_same_codes_as_decode(sampling: Sampling, width: int, texts: tuple[list[int], ...]) -> None:
    model = small_model(TEMPLATE, init_std=0.3)
    filled = decode(
        model,
        TEMPLATE,
        prompts_of(TEMPLATE, texts),
        seeds=range(len(texts)),
        sampling=sampling,
        unconditional=without_text(TEMPLATE, texts),
    )
    assert len({code for row in filled for code in row}) > 3  # a broken model would repeat a code
    assert by_static_steps(model, TEMPLATE, texts, sampling, width) == filled


@pytest.mark.parametrize("attention", ["fused", "pb_relax", "naive"])
def test_restarting_positions_and_forms_of_attention(attention: str) -> None:
    torch.manual_seed(0)
    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_positions": TWO_IMAGES.num_positions,
        "init_std": 0.3,
    }
    model = make_transformer(vocab_size=VOCABULARY.size, attention=attention, **sizes).eval()  # type: ignore[arg-type]
    prompts = prompts_of(TWO_IMAGES, TEXTS)
    filled = decode(model, TWO_IMAGES, prompts, seeds=range(4), sampling=Sampling())
    assert by_static_steps(model, TWO_IMAGES, TEXTS, Sampling(), 16) == filled


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("width", [8, 256], ids=["several_graphs", "one_graph"])
def test_a_recorded_step_can_be_replayed(sampling: Sampling, width: int) -> None:
    model = small_model(TEMPLATE, init_std=0.3)
    plainly = by_static_steps(model, TEMPLATE, TEXTS, sampling, width)
    assert by_static_steps(model, TEMPLATE, TEXTS, sampling, width, recorded) == plainly


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_decode_by_steps_on_fixed_memory(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop as on a GPU: the first token by single operations, the others by graphed steps."""
    model, prompts, reported = small_model(TEMPLATE, init_std=0.3), prompts_of(TEMPLATE, TEXTS), []
    arguments: dict[str, Any] = {
        "seeds": range(4),
        "sampling": sampling,
        "unconditional": prompts_of(TEMPLATE, ([],) * 4),
    }
    plainly = decode(model, TEMPLATE, prompts, **arguments)
    monkeypatch.setattr("cogview_pl.generation.decode.can_capture", lambda *_: True)
    assert decode(model, TEMPLATE, prompts, **arguments, on_step=lambda: reported.append(1)) == plainly
    assert len(reported) == TEMPLATE.target.length


def test_spans_cover_every_step_and_reach_far_enough() -> None:
    for longest, steps, width in [(1, 1, 4), (3, 1, 4), (4, 9, 4), (7, 30, 16), (69, 1023, 256), (5, 0, 8)]:
        read = longest
        for reach, count in spans(longest, steps, width):
            assert read < read + count <= reach < read + 1 + width  # the last step sees all; none sees much in vain
            read += count
        assert read == longest + steps


def test_the_cpu_keeps_its_own_path() -> None:
    assert not can_capture(small_model(TEMPLATE, init_std=0.3), TEMPLATE, Sampling())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_graphs_give_the_codes_of_single_operations(sampling: Sampling) -> None:
    model = small_model(TEMPLATE, init_std=0.3).to("cuda")
    assert can_capture(model, TEMPLATE, sampling)
    prompts = prompts_of(TEMPLATE, TEXTS)
    by_graphs, plainly = (
        decode(
            model,
            TEMPLATE,
            prompts,
            seeds=range(4),
            sampling=replace(sampling, cuda_graphs=graphs),
            unconditional=without_text(TEMPLATE, TEXTS),
        )
        for graphs in (True, False)
    )
    assert by_graphs == plainly
