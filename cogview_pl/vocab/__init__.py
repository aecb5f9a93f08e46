"""Tokens: the joint vocabulary, text tokens, and templates, which lay sequences out."""

from cogview_pl.vocab.roles import caption_slots, is_text_to_image, magnify_slots, makes_images, source_slots
from cogview_pl.vocab.template import CodeSlot, Sequence, Template, TextSlot
from cogview_pl.vocab.text import TextTokenizer
from cogview_pl.vocab.vocabulary import COMMANDS, Vocabulary

__all__ = [
    "COMMANDS",
    "CodeSlot",
    "Sequence",
    "Template",
    "TextSlot",
    "TextTokenizer",
    "Vocabulary",
    "caption_slots",
    "is_text_to_image",
    "magnify_slots",
    "makes_images",
    "source_slots",
]
