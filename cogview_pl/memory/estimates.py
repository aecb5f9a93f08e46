"""How much memory a configuration takes on one device: what every task holds, and when that is most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cogview_pl.config.choices import Verb
from cogview_pl.config.schema import Config
from cogview_pl.memory.bridge import images_of_run
from cogview_pl.memory.cards import WORKSPACE
from cogview_pl.memory.image_tokenizer import encoding_height
from cogview_pl.memory.inference import generate, image_tokenizer_bytes, magnify, rerank
from cogview_pl.memory.phases import Moments
from cogview_pl.memory.training import fit_image_tokenizer, fit_sequence_model


def estimate(config: Config, on_gpu: bool) -> Moments:
    """Memory of a run at its worst moments, as counted by its tensors.

    Args:
        config: the run.
        on_gpu: of its GPU; else of the main memory, where models that stay on the host count as well.

    Raises:
        UserError: sizes of the configuration do not fit together.
    """
    found = _VERBS[config.verb](config, on_gpu)
    workspace = Counter(workspace=WORKSPACE if on_gpu else 0)
    return Moments({name: parts + workspace for name, parts in found.parts.items()})


def _tokenize(config: Config, on_gpu: bool) -> Moments:
    images = images_of_run(config)
    edge = images.edge * (2 if config.token_store.large else 1)
    parts = Counter(image_tokenizer=image_tokenizer_bytes(images))
    return Moments({"encoding": parts + encoding_height(images.settings, batch=config.data.batch_size, edge=edge)})


def _fit_features(config: Config, on_gpu: bool) -> Moments:
    """Drawings are kept, once one by one and once in a row."""
    size = getattr(config.data, "train_size", 0) * 3 * config.data.image_size**2
    return Moments({"drawing": Counter(images=0 if on_gpu else 2 * size)})


def _evaluate(config: Config, on_gpu: bool) -> Moments:
    """As `generate`, beside the captioner; the feature network is not counted."""
    return generate(config, on_gpu)


def _convert(config: Config, on_gpu: bool) -> Moments:
    """Two copies of what is on disk, under the old names and the new ones; the GPU is not used."""
    assert config.convert is not None
    source = Path(config.convert.source)
    files = [file for file in ([source] if source.is_file() else source.rglob("*")) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return Moments({"converting": Counter(weights=0 if on_gpu else 2 * size)})


_VERBS: dict[Verb, Callable[[Config, bool], Moments]] = {
    Verb.fit_image_tokenizer: fit_image_tokenizer,
    Verb.fit_sequence_model: fit_sequence_model,
    Verb.tokenize: _tokenize,
    Verb.generate: generate,
    Verb.rerank: rerank,
    Verb.magnify: magnify,
    Verb.fit_features: _fit_features,
    Verb.evaluate: _evaluate,
    Verb.convert: _convert,
}
"""Of every task but `chain`, whose stages are tasks."""
