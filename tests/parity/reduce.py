"""Makes `records/`, a part of the original's records that is small enough for a clone, from all of them.

    python -m tests.parity.reduce FOLDER_OF_ALL_RECORDS

Left out are the large transformer with the whole vocabulary, sparse attention, and what only other tests need of the
files that stay. Nothing is changed: tensors that stay are the recorded ones.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

TARGET = Path(__file__).with_name("records")

WHOLE = (
    "data/compact.bin",
    "data/compact_expected.safetensors",
    "data/meta.json",
    "init/init.json",
    "init/lr_schedule.json",
    "positions/meta.json",
    "positions/positions.safetensors",
    "rerank/meta.json",
    "sampling/checkpoint/500/mp_rank_00_model_states.pt",
    "sampling/checkpoint/latest_checkpointed_iteration.txt",
    "sampling/filters.safetensors",
    "sampling/meta.json",
    "text/parse_query.json",
    "text/parse_query_images.json",
    "text/templates.json",
    "text/vocabulary.json",
    "transformer/meta.json",
    "transformer/units.safetensors",
    "vqvae/model.pt",
    "vqvae/read_img.safetensors",
    "vqvae/rgb_60x44.png",
    "vqvae/rgba_50x64.png",
    "vqvae/train_forward.safetensors",
)
"""Files that stay as they are."""

PARTS: dict[str, Callable[[str], bool]] = {
    "rerank/rerank.safetensors": lambda name: not name.startswith("full."),
    "sampling/cases.safetensors": lambda name: name.endswith((".sequence", ".output", ".generated_positions")),
    "sampling/magnify.safetensors": lambda name: (
        name in ("codes", "text_tokens", "output") or name.endswith(".sequence")
    ),
    "vqvae/io.safetensors": lambda name: name.endswith("_0"),
    "vqvae/quantizer_train.safetensors": lambda name: ".step3." not in name,
}
"""Files of which some tensors stay."""


def reduce(source: Path) -> None:
    """Write `records/` anew."""
    shutil.rmtree(TARGET, ignore_errors=True)
    for name in (*WHOLE, *PARTS):
        (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
    for name in WHOLE:
        shutil.copyfile(source / name, TARGET / name)
    for name, stays in PARTS.items():
        tensors = {key: value for key, value in load_file(source / name).items() if stays(key)}
        save_file(tensors, TARGET / name)
    meta = json.loads((source / "vqvae/meta.json").read_text(encoding="utf-8"))
    for model in meta["models"].values():
        del model["inputs"][1:]
    for run, steps in meta["quantizer_train"].items():
        meta["quantizer_train"][run] = steps[:2]
    (TARGET / "vqvae/meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    reduce(Path(sys.argv[1]))
