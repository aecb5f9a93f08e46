"""A resumed run is exact with every kind of data: tables are read by row, views by their number."""

from __future__ import annotations

from pathlib import Path

import pytest

from .rewound import KEEP_ALL, require_same, rewind
from .test_real_files import SIZES, write_table

STAGE_ONE = (
    "task=vqvae",
    *SIZES,
    *KEEP_ALL,
    "trainer.max_steps=6",
    "trainer.val_check_interval=6",
    "image_tokenizer.quantize_after_steps=2",
    "image_tokenizer.quantizer.kmeans_iters=1",
    "data.max_skipped_share=0.5",
)
SOURCES = {
    "parquet": ("data=parquet", "data.urls=table/*.parquet", "data.num_workers=1"),
    "hf": ("data=hf", "data.name=table", "data.views=3", "data.crop=random", "data.flip=true", "data.view_seed=4"),
}


@pytest.fixture(scope="module")
def runs(cli, tmp_path_factory) -> Path:
    """Runs that were stopped at step 3 and resumed; those that were not are in `whole/`."""
    pytest.importorskip("datasets")
    home = tmp_path_factory.mktemp("resumed")
    write_table(home / "table" / "train.parquet")
    ended = cli.run_many([([*STAGE_ONE, *data, f"run_dir={name}"], home) for name, data in SOURCES.items()], home)
    assert [result.stderr[-3000:] for result in ended if result.code] == []
    for name in SOURCES:
        rewind(home / name, home / "whole" / name)
    ended = cli.run_many([([f"resume={name}"], home) for name in SOURCES], home)
    assert [result.stderr[-3000:] for result in ended if result.code] == []
    return home


@pytest.mark.parametrize("source", SOURCES)
def test_resumed_training_is_exact(runs: Path, source: str) -> None:
    """Step 3 lies within an epoch; the steps after it see the samples of the run that was not stopped."""
    require_same(runs / "whole" / source, runs / source)
