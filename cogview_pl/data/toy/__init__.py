"""The toy world: coloured shapes with Chinese captions, several styles, and a judge that reads them back."""

from cogview_pl.data.toy.captions import LANGUAGES, STYLES, caption, parse_caption, style_name
from cogview_pl.data.toy.dataset import ToyDataset
from cogview_pl.data.toy.draw import draw
from cogview_pl.data.toy.judge import Detected, Judge, ToyScore, score, score_captions, score_detected
from cogview_pl.data.toy.scene import (
    COLOURS,
    HELD_OUT,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    Object,
    ObjectSpec,
    Scene,
    sample_scene,
    styles_held_out,
)

__all__ = [
    "COLOURS",
    "HELD_OUT",
    "LANGUAGES",
    "PLACES",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "STYLES",
    "Detected",
    "Judge",
    "Object",
    "ObjectSpec",
    "Scene",
    "ToyDataset",
    "ToyScore",
    "caption",
    "draw",
    "parse_caption",
    "sample_scene",
    "score",
    "score_captions",
    "score_detected",
    "style_name",
    "styles_held_out",
]
