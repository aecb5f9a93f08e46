"""The compiled step as the engine: logits and codes of the torch path, whatever the rows have read and refused."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cogview_pl.errors import UserError
from cogview_pl.generation.config import Algorithm, Engine, Quantization, Sampling
from cogview_pl.generation.decode import TO_SAMPLE, decode
from cogview_pl.generation.engine.compiled_cpu import CompiledModel
from cogview_pl.generation.engine.decode_state import DecodeState
from cogview_pl.generation.engine.forms import decoding_form, engine_of, keep_forms
from cogview_pl.generation.quantization import quantize
from cogview_pl.generation.speculative import decode_jacobi
from cogview_pl.generation.super_resolution.upscale import magnify
from cogview_pl.kernels import cpu_decoding
from cogview_pl.transformer.config import LoRAConfig, LoRATarget
from cogview_pl.transformer.lora import add_lora
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template
from tests.make_models import make_transformer

from ..small_model import TWO_IMAGES, VOCABULARY, small_model

IMAGE = Template(
    "[ROI1] {text} [BASE] [BOI1] {image:3x3} [EOI1]", target="image", loss={}, vocabulary=VOCABULARY, text_length=5
)
CAPTION = Template(
    "[BASE] [BOI1] {image:3x3} [EOI1] [ROI1] {text} [SEP]",
    target="text",
    loss={},
    vocabulary=VOCABULARY,
    text_length=6,
)
TEXTS = ([3, 1, 4, 1, 5], [], [9, 2])
IDS = [range(10, 40)]


def both(sampling: Sampling) -> tuple[Sampling, Sampling]:
    return replace(sampling, engine=Engine.torch), replace(sampling, engine=Engine.compiled)


def prompts_of(template: Template) -> list[list[int]]:
    return [template.prompt({"text": text}) for text in TEXTS]


@torch.no_grad()
def assert_same_logits(model: Transformer, tolerance: float = 1e-5) -> None:
    """Logits of a prompt, single steps and drafts; the tolerance is relative to the largest."""
    tokens, positions = torch.randint(60, (2, 9)), torch.arange(9).expand(2, -1).contiguous()
    wanted = model.logits(model.hidden(tokens, positions), IDS).float()
    form = decoding_form(model, 2, IDS, Engine.compiled)
    assert isinstance(form, CompiledModel)
    cache, found = model.new_cache(2, 9), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 8), slice(8, 9)):
        found.append(form.logits(form.hidden(tokens[:, part].contiguous(), positions[:, part].contiguous(), cache)))
        cache.advance(part.stop - part.start)
    assert (torch.cat(found, 1) - wanted).abs().max() < tolerance * wanted.abs().max()


def model_of(**options: object) -> Transformer:
    """Weights whose norms have scales and shifts, as after training."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_positions": 20}
    model = make_transformer(**sizes, **{"init_std": 0.3, **options}).eval()
    for vector in model.parameter_groups().vectors:
        nn.init.normal_(vector, 1.0, 0.3)
    return model


@pytest.mark.parametrize(
    "norm, norm_scope", [("sandwich", "token"), ("sandwich", "none"), ("pre", "token"), ("pre", "none")]
)
def test_logits(norm: str, norm_scope: str) -> None:
    assert_same_logits(model_of(norm=norm, norm_scope=norm_scope))


def test_pb_relax_of_tiny_and_of_huge_numbers() -> None:
    model = model_of()
    with torch.no_grad():
        model.token_embedding.weight[:30] *= 1e-7
        model.token_embedding.weight[30:45] *= 1e6
        model.position_embedding.weight[:5] = 0
    assert_same_logits(model)


def test_adapters_are_merged() -> None:
    model = model_of()
    targets = [LoRATarget.qkv, LoRATarget.down, LoRATarget.tokens]
    add_lora(model, LoRAConfig(rank=2, alpha=4.0, targets=targets, merge=False))
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, 0.0, 0.1)
    assert_same_logits(model.eval())


def test_int8() -> None:
    pytest.importorskip("torchao")
    model = model_of()
    quantize(model, Quantization.int8)
    assert_same_logits(model)


def test_bf16() -> None:
    assert_same_logits(model_of().bfloat16(), 0.05)  # numbers between the weights are fp32 here


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_a_row_does_not_depend_on_rows_and_threads(rows: int) -> None:
    """To the bit, for rows of different lengths."""
    model, threads = model_of(), torch.get_num_threads()
    form = CompiledModel(model, IDS)
    tokens = torch.randint(60, (rows, 5))

    def logits(part: slice) -> Tensor:
        """Row r skips every (r + 2)-th step: it reads a token that does not count."""
        cache, numbers = model.new_cache(len(tokens[part]), 8), range(rows)[part]
        found = []
        for step in range(5):
            positions = cache.lengths[:, None].clone()
            found.append(form.logits(form.hidden(tokens[part, step, None], positions, cache)))
            cache.advance([int((step + 1) % (row + 2) > 0) for row in numbers])
        return torch.cat(found, 1)

    try:
        torch.set_num_threads(1)
        alone = torch.cat([logits(slice(row, row + 1)) for row in range(rows)])
        together = logits(slice(None))
        torch.set_num_threads(2)
        by_two = logits(slice(None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(by_two, together)
    assert torch.equal(together, alone)


@torch.no_grad()
def test_a_full_cache_is_refused() -> None:
    model = model_of()
    form, cache = CompiledModel(model, IDS), model.new_cache(1, 2)
    for position in range(2):
        form.hidden(torch.tensor([[3]]), torch.tensor([[position]]), cache)
        cache.advance(1)
    with pytest.raises(ValueError, match="room for 2 positions"):
        form.hidden(torch.tensor([[3]]), torch.tensor([[2]]), cache)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_codes_of_prompts_of_different_lengths(guidance: float) -> None:
    model, prompts, empty = small_model(IMAGE, init_std=0.3), prompts_of(IMAGE), [IMAGE.prompt({"text": []})] * 3
    for sampling in (Sampling(temperature=0, guidance=guidance), Sampling(top_k=10, guidance=guidance)):
        torch_rows, found = (
            decode(model, IMAGE, prompts, seeds=range(3), sampling=one, unconditional=empty) for one in both(sampling)
        )
        assert found == torch_rows
    assert len({code for row in found for code in row}) > 5


def test_given_codes() -> None:
    model, known = small_model(IMAGE, init_std=0.3), torch.full((3, 9), TO_SAMPLE)
    known[:, [0, 1, 4, 5, 6]] = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15]])
    torch_rows, found = (
        decode(model, IMAGE, prompts_of(IMAGE), seeds=range(3), sampling=one, known=known)
        for one in both(Sampling(temperature=0))
    )
    assert found == torch_rows


def test_captions() -> None:
    model = small_model(CAPTION, init_std=0.3)
    prompts = [CAPTION.prompt({"image": list(range(start, start + 9))}) for start in (0, 10, 20)]
    torch_rows, found = (
        decode(model, CAPTION, prompts, seeds=range(3), sampling=one) for one in both(Sampling(top_k=5))
    )
    assert found == torch_rows


@pytest.mark.parametrize("drafts", [2, 20])
def test_refused_drafts(drafts: int) -> None:
    model, prompts = small_model(IMAGE, init_std=0.3), prompts_of(IMAGE)
    sampling = Sampling(temperature=0, algorithm=Algorithm.jacobi, drafts=drafts)
    torch_result, found = (decode_jacobi(model, IMAGE, prompts, seeds=range(3), sampling=one) for one in both(sampling))
    assert found == torch_result


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=10)], ids=["greedy", "sampled"])
def test_windows_of_super_resolution(sampling: Sampling) -> None:
    model = small_model(TWO_IMAGES, init_std=0.3)
    codes = torch.randint(40, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    torch_codes, found = (
        magnify(model, TWO_IMAGES, TEXTS[:2], codes, seeds=range(2), sampling=one) for one in both(sampling)
    )
    assert torch.equal(found, torch_codes)
    assert len(found.unique()) > 5


@torch.no_grad()
def test_a_state_can_read_new_prompts() -> None:
    model, prompts = small_model(IMAGE, init_std=0.3), prompts_of(IMAGE)
    state = DecodeState(model, IMAGE, 3, 20, engine=Engine.compiled)
    first = state.prefill(prompts)
    state.step(torch.tensor([[5], [6], [7]]))
    state.advance(1)
    assert torch.equal(state.prefill(prompts), first)


def prepared_for(model: Transformer, rows: int, engine: Engine) -> object:
    return decoding_form(model, rows, IDS, engine)


def test_weights_are_prepared_once_if_they_stay() -> None:
    trained, kept = model_of(), model_of()
    keep_forms(kept)
    assert prepared_for(trained, 2, Engine.compiled) is not prepared_for(trained, 2, Engine.compiled)
    assert prepared_for(kept, 2, Engine.compiled) is prepared_for(kept, 5, Engine.compiled)
    if not isinstance(prepared_for(kept, 4, Engine.torch), Transformer):
        assert prepared_for(kept, 4, Engine.torch) is prepared_for(kept, 4, Engine.torch)
        assert prepared_for(kept, 4, Engine.torch) is not prepared_for(kept, 8, Engine.torch)
    gone = weakref.ref(kept)
    del kept
    gc.collect()
    assert gone() is None  # the forms do not hold the model


def test_a_form_outlives_its_model() -> None:
    tokens, positions = torch.tensor([[1]]), torch.tensor([[0]])
    model = model_of()
    cache = model.new_cache(1, 4)
    form = CompiledModel(model, IDS)
    before = form.logits(form.hidden(tokens, positions, cache))
    del model
    gc.collect()
    torch.full((60, 32), 7.0)  # takes memory that became free
    assert torch.equal(form.logits(form.hidden(tokens, positions, cache)), before)


def test_auto_takes_what_the_step_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    assert engine_of(model, Engine.auto) == Engine.compiled
    assert engine_of(model, Engine.torch) == Engine.torch
    for options in ({"norm_scope": "tensor"}, {"norm": "post"}, {"attention": "naive"}):
        assert engine_of(model_of(**options), Engine.auto) == Engine.torch
        with pytest.raises(UserError, match=r"sampler\.engine=compiled decodes on a CPU with norm_scope"):
            engine_of(model_of(**options), Engine.compiled)
    monkeypatch.setattr(cpu_decoding.LIBRARY, "missing", "no C++ compiler was found (g++); install one")
    assert engine_of(model, Engine.auto) == Engine.torch
    with pytest.raises(UserError, match=r"sampler\.engine=compiled: no C\+\+ compiler .*set sampler\.engine=torch"):
        engine_of(model, Engine.compiled)
