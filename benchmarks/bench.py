"""`nox -s bench`: speed of training and sampling on this machine, medians of warm runs.

Usage: python benchmarks/bench.py [decode] [train] [vq]
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

from cogview_pl.generation import Sampling, fill
from cogview_pl.transformer import Transformer, sequence_loss
from cogview_pl.vocab import Template, Vocabulary
from cogview_pl.vqvae import VQVAE, make_quantizer

REPEATS = 5
SHAPES = {"S1": (6, 384, 6), "S2": (12, 768, 12)}  # layers, width, heads
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def median_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median wall time of a warm call."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def setting(shape: str, num_pieces: int, grid: int) -> tuple[Transformer, Template]:
    """A model of one of the shapes with random weights, and a text-to-image layout."""
    layers, width, heads = SHAPES[shape]
    vocabulary = Vocabulary(8192, num_pieces)
    template = Template(
        f"[ROI1] {{text}} [BASE] [BOI1] {{image:{grid}x{grid}}} [EOI1]",
        target="image",
        loss={"text": 1.0, "image": 1.0},
        vocabulary=vocabulary,
        text_length=60,
    )
    model = Transformer(
        vocabulary_size=vocabulary.size,
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_positions=template.num_positions,
    )
    return model.to(DEVICE), template


def decode() -> None:
    """Sampling: milliseconds per step for 256 codes behind a prompt of 64 tokens."""
    for shape in SHAPES:
        model, template = setting(shape, 50_000, 16)
        prompt = template.prompt({"text": list(range(60))})
        for batch in (1, 4, 16):
            prompts, seeds = [prompt] * batch, list(range(batch))
            sampling = Sampling(top_k=200)
            seconds = median_seconds(
                lambda m=model, t=template, p=prompts, s=seeds, c=sampling: fill(m, t, p, seeds=s, sampling=c), 3
            )
            step = seconds / 256
            print(f"decode {shape} batch {batch:2}: {step * 1e3:6.2f} ms/step, {batch / step:7.0f} tok/s")


def train() -> None:
    """A training step of 4 sequences of 1,088 tokens at vocabulary 58,240, forward and backward."""
    for shape in SHAPES:
        model, template = setting(shape, 50_000, 32)
        length = template.length
        tokens = torch.randint(0, 8192, (4, length), device=DEVICE)
        positions = torch.arange(length, device=DEVICE).expand(4, -1)
        weights, slots = torch.ones(4, length, device=DEVICE), torch.zeros_like(tokens)

        def step(m: Transformer = model) -> None:
            m.zero_grad()
            sequence_loss(m, tokens, positions, weights, slots, 1).loss.backward()  # noqa: B023

        seconds = median_seconds(step, 2)
        print(f"train  {shape}: {seconds:6.2f} s/step, {4 * length / seconds:7.0f} tok/s")


def vq() -> None:
    """The released image tokenizer's shape: pictures of 256 pixels per second."""
    quantizer = make_quantizer("fixed", num_codes=8192, code_dim=256, commitment_weight=0.25)
    model = VQVAE(
        width=512,
        code_dim=256,
        num_codes=8192,
        downsampling=8,
        residual_blocks=0,
        quantizer=quantizer,
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
    model = model.to(DEVICE).to(memory_format=torch.channels_last).eval()
    images = torch.rand(4, 3, 256, 256, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        codes = model.encode(images)
        for name, work in (("encode", lambda: model.encode(images)), ("decode", lambda: model.decode(codes))):
            print(f"vq     {name}: {4 / median_seconds(work):6.2f} pictures/s")


if __name__ == "__main__":
    print(f"{platform.machine()} {DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in sys.argv[1:] or ("decode", "train", "vq"):
        {"decode": decode, "train": train, "vq": vq}[name]()
