"""`nox -s bench -- [decode] [train] [vq] [startup] [sparse]`: ours beside references, in turns, warm, medians.

Ratios of one run count; seconds of two runs on a shared machine do not compare.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import references, sparse
from benchmarks.contest import Timing, Work, contest
from cogview_pl.transformer import sequence_loss
from cogview_pl.vqvae import VQVAE, make_quantizer

DECODE = [  # shape, precision, pictures at once, new tokens, vocabulary of the peer
    ("S1", "fp32", 1, 256, 8192),
    ("S1", "bf16", 1, 256, 8192),
    ("S2", "fp32", 1, 256, 8192),
    ("S2", "bf16", 1, 256, 8192),
    ("S1", "fp32", 1, 256, 58240),
    ("S2", "fp32", 1, 256, 58240),
    ("S1", "fp32", 4, 256, 8192),
    ("S1", "fp32", 16, 256, 8192),
    ("S1", "fp32", 1, 1024, 8192),
]
TRAIN = [("S1", "fp32"), ("S1", "bf16"), ("S2", "bf16")]
TRAIN_BATCH, TRAIN_GRID = 4, 32
DEVICE = references.DEVICE


def decode() -> None:
    """Sampling behind a prompt of 64 tokens: milliseconds per step, and how many times faster than each reference."""
    for shape, dtype, batch, new, vocabulary in DECODE:
        grid = round(new**0.5)
        contenders = {
            "ours": references.ours(shape, dtype, batch, grid),
            "Hugging Face": references.hugging_face_decode(shape, dtype, batch, new, vocabulary),
        }
        if new > 256:
            contenders["original's scheme"] = references.ours(shape, dtype, batch, grid, norm_scope="tensor")
        timings = contest(contenders, rounds=3)
        floors = contest(
            {
                "linears": references.bare_linears(shape, dtype, batch, 20),
                "stream": references.stream(shape, dtype, batch, new),
            },
            rounds=9,
        )
        per_step = {name: timing.median / new * 1e3 for name, timing in timings.items()}
        per_step["bare linears"] = floors["linears"].median / 20 * 1e3
        per_step["stream bound"] = floors["stream"].median * 1e3
        _print_row(
            f"decode {shape} {dtype} x{batch:<2} {new:4} tokens, peer's vocabulary {vocabulary}", per_step, timings
        )


def train() -> None:
    """A training step of 4 x 1,088 tokens at vocabulary 58,240: forward, backward, fused AdamW."""
    for shape, dtype in TRAIN:
        model, template = references.setting(shape, TRAIN_GRID)
        tokens = torch.randint(0, references.IMAGE_CODES, (TRAIN_BATCH, template.length), device=DEVICE)
        positions = torch.arange(template.length, device=DEVICE).expand_as(tokens)
        weights, slots = torch.ones(tokens.shape, device=DEVICE), torch.zeros_like(tokens)
        slots[:, references.PROMPT :] = 1
        by_slot = [template.predicted(slot) for slot in template.slots]
        tokens[:, : references.PROMPT] += by_slot[0].start
        loss = partial(sequence_loss, model, tokens, positions, weights, slots, 2)
        peer = references.hugging_face(shape, template.vocabulary.size).train()
        contenders = {
            "ours": _step(model, lambda loss=loss: loss().loss, dtype),
            "ours, loss over the slot": _step(model, lambda loss=loss, ids=by_slot: loss(ids).loss, dtype),
            "Hugging Face": _step(peer, lambda peer=peer, tokens=tokens: peer(tokens, labels=tokens).loss, dtype),
        }
        timings = contest(contenders, rounds=3)
        _print_row(f"train {shape} {dtype}", {name: timing.median * 1e3 for name, timing in timings.items()}, timings)


def vq() -> None:
    """The released image tokenizer's shape: milliseconds for four pictures of 256 pixels."""
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
        timings = contest({"encode": lambda: model.encode(images), "decode": lambda: model.decode(codes)}, rounds=5)
    _print_row("vq, 4 pictures", {name: timing.median * 1e3 for name, timing in timings.items()}, timings)


def startup() -> None:
    """What a user waits for before anything starts: seconds of whole commands."""
    run = [sys.executable, "-m", "cogview_pl.run"]
    commands = {
        "import": [sys.executable, "-c", "import cogview_pl"],
        "--help": [*run, "--help"],
        "unknown key": [*run, "task=pretrain", "no_such_key=1"],
    }
    quiet = partial(subprocess.run, capture_output=True, check=False)
    timings = contest({name: partial(quiet, command) for name, command in commands.items()}, rounds=5)
    _print_row("startup", {name: timing.median * 1e3 for name, timing in timings.items()}, timings)


def _step(model: nn.Module, loss: Callable[[], Tensor], dtype: str) -> Work:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()

    return run


def _print_row(title: str, milliseconds: dict[str, float], timings: dict[str, Timing]) -> None:
    first = next(iter(milliseconds.values()))
    print(title)
    for name, value in milliseconds.items():
        spread = f", spread {timings[name].spread:.0%}" if name in timings else ""
        print(f"    {name:26} {value:10.2f} ms   {value / first:6.2f} x the first{spread}", flush=True)


if __name__ == "__main__":
    print(f"{platform.machine()} {DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    verbs = {"decode": decode, "train": train, "vq": vq, "startup": startup, "sparse": sparse.main}
    for verb in sys.argv[1:] or verbs:
        verbs[verb]()
