"""What a run leaves, and what must be true of it after a fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.faults.fork_server import Ended

EVERY = 3  # steps between checkpoints: some before a validation, some not


class Wrong(AssertionError):
    """A promise was broken."""


def left_by(run: Path) -> dict[str, Any]:
    """Everything that must be equal: bytes of files, tensors of the last checkpoint, metrics but for times."""
    found: dict[str, Any] = {}
    for file in sorted(run.rglob("*")):
        name = file.relative_to(run).as_posix()
        if not file.is_file() or name in ("config.yaml", "painting.json") or name.endswith(".ckpt"):
            continue
        found[name] = file.read_bytes()
    if "metrics.json" in found:
        metrics = json.loads(found["metrics.json"])
        found["metrics.json"] = {key: value for key, value in metrics.items() if not key.startswith("perf/")}
    last = run / "checkpoints" / "last.ckpt"
    if last.exists():
        checkpoint = torch.load(last, map_location="cpu", weights_only=True)
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            found |= {f"last.ckpt {path}": value for path, value in leaves(checkpoint[part], part)}
    return found


def leaves(tree: Any, path: str) -> list[tuple[str, Any]]:
    """Leaves of nested dictionaries and lists, tensors as bytes."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}/{key}")]
    if isinstance(tree, (list, tuple)):
        return [leaf for number, value in enumerate(tree) for leaf in leaves(value, f"{path}/{number}")]
    return [(path, tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree)]


def require_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises Wrong naming what differs."""
    wrong = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    if wrong:
        values = [(found.get(name), wanted.get(name)) for name in wrong[:1] if name.endswith(".json")]
        raise Wrong(f"differs: {wrong[:8]} {values}")


def require_nothing_lost(run: Path, before: dict[str, bytes]) -> None:
    """What a stopped run had declared done is still there, and whole, when it has gone on."""
    for name, data in before.items():
        file = run / name
        if not file.exists() or not file.read_bytes().startswith(data):
            raise Wrong(f"{name} lost what had been written")


def declared(run: Path) -> dict[str, bytes]:
    """What a stopped run promises to have: whole pictures of its list, rows of its header, checkpoints that open."""
    found: dict[str, bytes] = {}
    for checkpoint in run.glob("checkpoints/*.ckpt"):
        try:
            torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise Wrong(f"{checkpoint.name} is no whole checkpoint: {error}") from error
    steps = [int(file.stem.split("_")[1]) for file in run.glob("checkpoints/step_*.ckpt")]
    if steps and max(steps) > EVERY and not (run / "checkpoints" / "last.ckpt").exists():
        raise Wrong("there is no last.ckpt any more")
    header = run / "store" / "header.json"
    if header.exists():
        for name, split in json.loads(header.read_bytes())["splits"].items():
            keys = run / "store" / f"{name}.keys.txt"
            found[f"store/{name}.keys.txt"] = keys.read_bytes()[: split["key_bytes"]] if keys.exists() else b""
            if len(found[f"store/{name}.keys.txt"]) != split["key_bytes"]:
                raise Wrong(f"{name}: the header counts keys that are not there")
    samples = run / "samples.jsonl"
    if samples.exists():
        for line in samples.read_bytes().split(b"\n")[:-1]:
            file = json.loads(line)["file"]
            Image.open(run / file).load()
            found[file] = (run / file).read_bytes()
    return found


def require_one_line(ended: Ended) -> str:
    """Exit code 2 and one line of ours, as the last one; returns it."""
    lines = [line for line in ended.output.splitlines() if line.strip()]
    if ended.code != 2 or "Traceback" in ended.output or not lines or not lines[-1].startswith("cogview_pl: "):
        raise Wrong(f"code {ended.code}: {ended.output[-1500:]}")
    return lines[-1]
