"""Training of the feature networks: on styles and attributes of the toy world, or on the captions of any data set."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cogview_pl.assembly.image_data import open_images, validation_images
from cogview_pl.data.bad_samples import BadSampleLog, ImageBatch, collate_images, enough_to_judge
from cogview_pl.data.config import DataConfig
from cogview_pl.data.loader import Loader, suitable_workers
from cogview_pl.data.sampler import EndlessSampler, at_equal_distances
from cogview_pl.data.samples import CaptionedImages
from cogview_pl.durable.write import write_text
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.evaluation.caption_network import CaptionNetwork, CaptionTraining, average_precision, share_found
from cogview_pl.evaluation.caption_terms import CaptionTerms, choose_terms
from cogview_pl.evaluation.config import FeaturesConfig
from cogview_pl.evaluation.convolutions import SMALLEST
from cogview_pl.evaluation.feature_folder import TrainedOn, save_caption_network, save_toy_network
from cogview_pl.evaluation.style_network import ToyNetwork, attributes_of, train_network
from cogview_pl.lit.bars import Bar, status
from cogview_pl.toy_world.dataset import ToyDataset

TERMS = "terms.csv"
"""Table of the terms in the model folder of a network that learned from captions."""

_MOST_CAPTIONS = 100_000  # captions that terms are chosen from, as many as give exact shares
_FEWEST_IMAGES = 2  # of a batch, for batch norm

_log = logging.getLogger(__name__)


def check_image_size(data: DataConfig) -> None:
    """Raises UserError for images that are too small for the networks."""
    if data.image_size < SMALLEST:
        raise UserError(f"data.image_size={data.image_size}: the feature network needs {SMALLEST} pixels at least")


def fit_toy_network(options: FeaturesConfig, data: DataConfig, seed: int, model: Path) -> dict[str, float]:
    """Train on styles and attributes of the toy world, and write the model folder.

    Args:
        options: size and training of the network.
        data: the toy world.
        seed: of the order and of the augmentation.
        model: the folder.

    Returns:
        Accuracy of styles on validation images.

    Raises:
        UserError: there are fewer than two styles.
    """
    styles = data.arguments().get("styles") or []
    if len(styles) < 2:
        raise UserError(f"data.styles={styles}: the network classifies styles; give two or more")
    source, images, labels, attributes = _drawings(data, "train")
    network = ToyNetwork(options.hidden_size, options.num_features, len(styles))
    steps = options.epochs * -(-len(images) // data.batch_size)
    with Bar("train", steps, "steps") as bar:

        def count() -> None:
            SIGNALS.check()
            bar.update()

        train_network(
            network, images, labels, attributes, options, batch_size=data.batch_size, seed=seed, on_step=count
        )
    save_toy_network(network, model, data.image_size, styles, _trained_on(data, source))
    _, images, labels, _ = _drawings(data, "val")
    with torch.no_grad():
        found = torch.cat([network(part.float() / 255)[1].argmax(1) for part in images.split(data.batch_size)])
    return {"features/style_accuracy": float((found == labels).double().mean())}


def _drawings(data: DataConfig, split: str) -> tuple[ToyDataset, Tensor, Tensor, Tensor]:
    """A split, its images uint8 `(N, 3, Y, X)`, style numbers int64 `(N,)`, and attributes float 0 or 1 `(N, A)`."""
    source = open_images(data, split)
    assert isinstance(source, ToyDataset)
    numbers = range(len(source))
    images = []
    with Bar(f"render {split}", len(numbers), "images") as bar:
        for number in numbers:
            SIGNALS.check()
            images.append(source[number].image)
            bar.update()
    labels = [source.styles.index(source.style(i)) for i in numbers]
    attributes = [attributes_of(source.scene(i)) for i in numbers]
    return source, torch.stack(images), torch.tensor(labels), torch.stack(attributes)


def fit_caption_network(
    options: FeaturesConfig, data: DataConfig, seed: int, model: Path, bad_samples: Path
) -> dict[str, float]:
    """Train on the terms of captions, and write the model folder with a table of the terms.

    Args:
        options: size and training of the network, choice of the terms.
        data: the data set.
        seed: of the order and of the augmentation.
        model: the folder.
        bad_samples: list of the samples that cannot be used.

    Returns:
        `features/…`: number of terms; mean average precision and share of terms found on validation images; the share
        found if the most frequent terms are guessed.

    Raises:
        UserError: no validation images, no terms, or too many samples that cannot be used.
    """
    train, val = open_images(data, "train"), validation_images(data)
    terms = choose_terms(_captions(train), options.terms)
    _log.info("%d terms of captions, such as %s", len(terms), ", ".join(terms.names[:5]))
    network = CaptionNetwork(options.hidden_size, options.num_features, len(terms))
    batches_per_epoch = -(-len(train) // data.batch_size)
    training = CaptionTraining(network, options, steps=options.epochs * batches_per_epoch, seed=seed)
    log = BadSampleLog(bad_samples, data.max_skipped_share, enough_to_judge(len(train)))
    order = EndlessSampler(len(train), seed)
    batches = iter(_loader(train, data, len(train), sampler=order, batch_size=data.batch_size))
    found, precisions = dict[str, float](), torch.empty(0)
    for epoch in range(options.epochs):
        _train_epoch(training, terms, batches, log, range(epoch * batches_per_epoch, (epoch + 1) * batches_per_epoch))
        found, precisions = _validate(network, terms, val, data, log)
        numbers = ", ".join(f"{name.partition('/')[2]} {value:.3f}" for name, value in found.items())
        _log.info("epoch %d of %d: %s", epoch + 1, options.epochs, numbers)
    model.mkdir(parents=True, exist_ok=True)
    write_text(model / TERMS, _table(terms, precisions))
    save_caption_network(network, model, data.image_size, _trained_on(data, train), others=(TERMS,))
    return {**found, "features/terms": float(len(terms))}


def _captions(images: CaptionedImages) -> Iterator[str]:
    status("reading the captions …")
    for index in at_equal_distances(len(images), _MOST_CAPTIONS):
        SIGNALS.check()
        yield images.text(index)


def _loader(images: CaptionedImages, data: DataConfig, count: int, **options: object) -> Loader[ImageBatch]:
    """Batches of `count` images of a data set, which `options` choose."""
    return Loader(
        images,
        num_workers=suitable_workers(data.num_workers, count, 1),
        collate_fn=collate_images,
        patience=data.worker_timeout,
        look=SIGNALS.check,
        **options,
    )


def _train_epoch(
    training: CaptionTraining, terms: CaptionTerms, batches: Iterator[ImageBatch], log: BadSampleLog, steps: range
) -> None:
    """Train on the next batches, one for each of the steps."""
    with Bar("train", steps.stop, "steps", done=steps.start) as bar:
        for step in steps:
            SIGNALS.check()
            batch = next(batches)
            log.add(batch.skipped, batch.seen)
            if len(batch.images) >= _FEWEST_IMAGES:
                training.step(batch.images, terms.labels(batch.texts))
            bar.reach(step + 1, lambda: f"loss {training.loss:.4f}")


@torch.no_grad()
def _validate(
    network: CaptionNetwork, terms: CaptionTerms, val: CaptionedImages, data: DataConfig, log: BadSampleLog
) -> tuple[dict[str, float], Tensor]:
    """Metrics on validation images, and the average precision of each term, float64 `(T,)`."""
    network.eval()
    samples = at_equal_distances(len(val), data.max_val_samples)
    scores, labels = [], []
    for batch in _loader(val, data, len(samples), sampler=samples, batch_size=data.batch_size):
        SIGNALS.check()
        log.note(batch.skipped)
        if len(batch.images):
            scores.append(network(batch.images.float() / 255)[1])
            labels.append(terms.labels(batch.texts))
    if not labels or not any(part.any() for part in labels):
        raise UserError("features.terms: no validation image that can be read has a caption with one of the terms")
    scores_NT, labels_NT = torch.cat(scores), torch.cat(labels)
    precisions = average_precision(scores_NT, labels_NT)
    found = {
        "features/mean_average_precision": float(precisions.nanmean()),
        "features/terms_found": share_found(scores_NT, labels_NT),
        "features/terms_found_by_frequency": share_found(terms.shares.expand_as(labels_NT), labels_NT),
    }
    return found, precisions


def _table(terms: CaptionTerms, precisions: Tensor) -> str:
    """Each term, the share of the training captions with it, and its average precision; empty if it is unknown."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("term", "share", "average_precision"))
    for name, share, precision in zip(terms.names, terms.shares.tolist(), precisions.tolist(), strict=True):
        rows.writerow((name, f"{share:.4f}", "" if precision != precision else f"{precision:.4f}"))
    return text.getvalue()


def _trained_on(data: DataConfig, images: CaptionedImages) -> TrainedOn:
    return TrainedOn(data._target_, len(images), images.fingerprint())
