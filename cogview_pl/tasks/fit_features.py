"""task=features: train a feature network for the perceptual loss and for task=evaluate."""

from __future__ import annotations

import time

from cogview_pl.assembly.feature_training import check_image_size, fit_caption_network, fit_toy_network
from cogview_pl.assembly.image_data import is_toy_world
from cogview_pl.assembly.trainer import seed_all
from cogview_pl.config.schema import Config
from cogview_pl.runs.run_folder import RunFolder


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Train and write `model/`; returns metrics of validation images.

    On the toy world the network learns styles and attributes, on other data the terms of captions.
    """
    options, data = config.features, config.data
    assert options is not None
    check_image_size(data)
    seed_all(config.seed)
    started = time.perf_counter()
    if is_toy_world(data):
        metrics = fit_toy_network(options, data, config.seed, folder / "model")
    else:
        metrics = fit_caption_network(options, data, config.seed, folder / "model", folder / "skipped.jsonl")
    return {**metrics, "perf/features_s": round(time.perf_counter() - started, 1)}
