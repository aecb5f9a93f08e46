"""Peers that decode with a runtime of their own: CTranslate2, with a GPT-2 of the same shape and random weights."""

from __future__ import annotations

import importlib.util
import tempfile

import torch

from benchmarks import references
from benchmarks.contest import Work
from benchmarks.settings import DEVICE, PROMPT, TOP_K
from cogview_pl.generation.config import Quantization


def ctranslate2_runs(dtype: str) -> bool:
    """Whether CTranslate2 is installed and computes in this precision on a CPU."""
    return importlib.util.find_spec("ctranslate2") is not None and DEVICE.type == "cpu" and dtype == "fp32"


def ctranslate2_decode(shape: str, batch: int, new: int, vocabulary: int, quantization: Quantization | None) -> Work:
    """Decode with the same sampling; int8 quantizes weights when the model is made, and activations at each step."""
    import ctranslate2

    compute_type = "int8" if quantization == Quantization.int8 else "float32"
    with tempfile.TemporaryDirectory() as folder:
        _save(shape, vocabulary, folder, compute_type)
        generator = ctranslate2.Generator(
            folder, device="cpu", compute_type=compute_type, intra_threads=torch.get_num_threads()
        )
    prompts = [[str(token) for token in torch.randint(0, vocabulary, (PROMPT,)).tolist()]] * batch
    arguments = dict(sampling_topk=TOP_K, min_length=new, max_length=new, end_token=[], include_prompt_in_result=False)
    return lambda: generator.generate_batch(prompts, **arguments)


def _save(shape: str, vocabulary: int, folder: str, compute_type: str) -> None:
    """Write a GPT-2 in CTranslate2's format, as its converter would; the end token never stops a sequence."""
    from ctranslate2.converters.transformers import GPT2Loader

    loader = GPT2Loader()
    spec = loader.get_model_spec(references.hugging_face(shape, vocabulary))
    loader.set_vocabulary(spec, [str(token) for token in range(vocabulary)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.optimize(quantization=compute_type)
    spec.save(folder)
