"""Protocol of an evaluation, and comparison of two `metrics.json` with the same protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from cogview_pl.durable.read import why_unusable
from cogview_pl.errors import UserError

PROTOCOL = "protocol/"
_KEY = "evaluate.compare"
_LEFT_OUT = (PROTOCOL, "perf/")

Metrics = Mapping[str, "float | str"]


def digest_of_prompts(prompts: Sequence[str]) -> str:
    """SHA-256 of a list of prompts."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def digest_of_weights(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def compare(paths: Sequence[str]) -> dict[str, float | str]:
    """`first/NAME`, `second/NAME` and `difference/NAME` (second − first) of every metric, and the common protocol.

    Args:
        paths: two run folders of task=evaluate, or their `metrics.json`.

    Raises:
        UserError: there are not two paths; a file is missing, is no JSON or has no protocol; the protocols differ.
    """
    if len(paths) != 2:
        raise UserError(f"{_KEY}={list(paths)}: found {len(paths)}; give two runs or two metrics.json")
    first, second = (_read(Path(path)) for path in paths)
    for key in sorted({key for key in (*first, *second) if key.startswith(PROTOCOL)}):
        if first.get(key) != second.get(key):
            raise UserError(
                f"{_KEY}: {key} is {first.get(key, 'not set')} in {paths[0]} and {second.get(key, 'not set')} in "
                f"{paths[1]}; numbers of different protocols cannot be compared, evaluate both in the same way"
            )
    found: dict[str, float | str] = {key: value for key, value in first.items() if key.startswith(PROTOCOL)}
    for name in sorted({key for key in (*first, *second) if not key.startswith(_LEFT_OUT)}):
        for side, metrics in (("first", first), ("second", second)):
            if name in metrics:
                found[f"{side}/{name}"] = metrics[name]
        if name in first and name in second:
            found[f"difference/{name}"] = float(second[name]) - float(first[name])
    return found


def table(compared: Metrics) -> str:
    """Result of `compare` as text: one line per metric, with both values and their difference."""
    sides = ("first", "second", "difference")
    names = sorted({key.split("/", 1)[1] for key in compared if key.split("/", 1)[0] in sides})
    width = max(map(len, names), default=0)
    lines = [" ".join([" " * width, *(f"{side:>12}" for side in sides)])]
    for name in names:
        cells = (compared.get(f"{side}/{name}") for side in sides)
        lines.append(" ".join([f"{name:{width}}", *("–".rjust(12) if c is None else f"{c:12.5g}" for c in cells)]))
    return "\n".join(lines)


def _read(path: Path) -> dict[str, float | str]:
    file = path / "metrics.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{_KEY}: {file} {why_unusable(file)}; give a run folder of task=evaluate or its metrics.json")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{_KEY}: {file} is not JSON ({error}); give a run folder of task=evaluate") from None
    if not isinstance(found, dict) or not any(key.startswith(PROTOCOL) for key in found):
        raise UserError(f"{_KEY}: {file} has no protocol ({PROTOCOL}…); give a run of task=evaluate")
    return found
