"""task=features: train the feature network of the toy world for task=evaluate."""

from __future__ import annotations

import time

import torch

from cogview_pl.assembly.image_data import open_images
from cogview_pl.assembly.trainer import seed_all
from cogview_pl.config.schema import Config
from cogview_pl.data.config import DataConfig
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.evaluation.style_network import ToyNetwork, attributes_of, save_network, train_network
from cogview_pl.lit.bars import Bar
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.toy_world.dataset import ToyDataset


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Train and write `model/`; returns the accuracy of styles on validation images."""
    options = config.features
    assert options is not None
    styles = config.data.arguments().get("styles") or []
    if len(styles) < 2:
        raise UserError(f"data.styles={styles}: the network classifies styles; give two or more")
    seed_all(config.seed)
    started = time.perf_counter()
    images, labels, attributes = _images(config.data, "train")
    network = ToyNetwork(options.hidden_size, options.num_features, len(styles))
    steps = options.epochs * -(-len(images) // config.data.batch_size)
    with Bar("train", steps, "steps") as bar:

        def count() -> None:
            SIGNALS.check()
            bar.update()

        train_network(
            network,
            images,
            labels,
            attributes,
            epochs=options.epochs,
            batch_size=config.data.batch_size,
            lr=options.lr,
            blur_radius=options.blur,
            noise=options.noise,
            tint=options.tint,
            seed=config.seed,
            on_step=count,
        )
    save_network(network, folder / "model", config.data.image_size, styles)
    images, labels, _ = _images(config.data, "val")
    with torch.no_grad():
        found = torch.cat([network(part.float() / 255)[1].argmax(1) for part in images.split(config.data.batch_size)])
    return {
        "features/style_accuracy": float((found == labels).double().mean()),
        "perf/features_s": round(time.perf_counter() - started, 1),
    }


def _images(data: DataConfig, split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images uint8 `(N, 3, Y, X)`, style numbers int64 `(N,)`, and attributes float 0 or 1 `(N, A)`."""
    source = open_images(data, split)
    if not isinstance(source, ToyDataset):
        raise UserError(f"data._target_={data._target_}: task=features learns the toy world; set data=toy")
    numbers = range(len(source))
    images = []
    with Bar(f"render {split}", len(numbers), "images") as bar:
        for number in numbers:
            SIGNALS.check()
            images.append(source[number].image)
            bar.update()
    labels = [source.styles.index(source.style(i)) for i in numbers]
    return torch.stack(images), torch.tensor(labels), torch.stack([attributes_of(source.scene(i)) for i in numbers])
