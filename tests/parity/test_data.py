"""A data file of the original, read and written: the rows that its data set yields, and the same bytes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from cogview_pl.data.sequence_dataset import SequenceCollator, SequenceDataset
from cogview_pl.data.token_store.cogview_bin import ReleasedFile
from cogview_pl.data.token_store.rows import COGVIEW, TokenRows
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.vocab import Template, TextTokenizer, Vocabulary

CONF = Path(__file__).parents[2] / "conf"


@dataclass(frozen=True)
class Recorded:
    """The recorded file and the sizes that it does not say itself."""

    file: Path
    text_length: int
    edge: int
    vocabulary: Vocabulary
    texts: list[str]

    @property
    def sizes(self) -> dict[str, Any]:
        """Sizes as stores take them."""
        return {
            "text_length": self.text_length,
            "grid": (self.edge, self.edge),
            "text_vocab_size": self.vocabulary.text_vocab_size,
            "codebook_size": self.vocabulary.codebook_size,
        }

    def rows(self) -> TokenRows:
        """All rows of the file."""
        return ReleasedFile.open(self.file, val_fraction=0.0, **self.sizes).split("train")

    def dataset(self, text_length: int) -> SequenceDataset:
        """The rows laid out as the shipped template for training does."""
        settings = OmegaConf.create(
            {"image_tokenizer": {"image_size": 8 * self.edge, "downsampling": 8}, "text": {"max_length": text_length}}
        )
        settings.template = OmegaConf.load(CONF / "template" / "text_image.yaml")
        options: Any = OmegaConf.to_container(settings.template, resolve=True)
        template = Template(**options, vocabulary=self.vocabulary, text_length=text_length)
        return SequenceDataset(self.rows(), template, (self.edge, self.edge))


@pytest.fixture(scope="module")
def recorded(parity) -> Recorded:
    meta, vocabulary = parity.json("data/meta.json"), parity.json("text/vocabulary.json")
    sizes = re.match(r"(\d+) text ids .*\+ (\d+) codes", meta["row_layout"])
    assert sizes is not None
    return Recorded(
        file=parity / "data/compact.bin",
        text_length=int(sizes[1]),
        edge=math.isqrt(int(sizes[2])),
        vocabulary=Vocabulary(vocabulary["n_img"], vocabulary["n_text"]),
        texts=meta["texts"],
    )


@pytest.fixture(scope="module")
def expected(parity) -> dict[int, tuple[Tensor, Tensor]]:
    """Length → tokens and loss mask of all rows."""
    tensors = parity.tensors("data/compact_expected.safetensors")
    lengths = {int(match[1]) for name in tensors if (match := re.match(r"len(\d+)\.", name))}
    assert lengths
    return {length: (tensors[f"len{length}.text"], tensors[f"len{length}.loss_mask"]) for length in lengths}


class TestReading:
    def test_rows_are_the_originals(self, recorded, expected) -> None:
        """The original cuts whole rows to its length; laid out with room for all text, ours begin the same."""
        dataset = recorded.dataset(recorded.text_length)
        batch = SequenceCollator(recorded.vocabulary.pad)([dataset[i] for i in range(len(dataset))])
        for length, (tokens, _) in expected.items():
            room = length - batch.tokens.shape[1]  # negative: F.pad then cuts
            assert torch.equal(F.pad(batch.tokens, (0, room), value=recorded.vocabulary.pad), tokens)

    def test_loss_mask(self, recorded, expected) -> None:
        """The original's mask is on all but padding; of those tokens we weigh all text and codes."""
        dataset = recorded.dataset(recorded.text_length)
        sequences = [dataset[i] for i in range(len(dataset))]
        batch = SequenceCollator(recorded.vocabulary.pad)(sequences)
        for length, (tokens, mask) in expected.items():
            real = torch.tensor([[i < len(sequence.tokens) for i in range(length)] for sequence in sequences])
            assert torch.equal(real.long(), mask)
            weights = F.pad(batch.weights, (0, length - batch.weights.shape[1]))
            assert (weights[tokens < recorded.vocabulary.text_tokens.stop] == 1).all()
            assert (weights[~real] == 0).all()

    def test_a_long_caption_is_cut_and_the_image_stays_whole(self, recorded, expected) -> None:
        """With the text slot of the released models, where the original cuts the last codes off."""
        text_length = OmegaConf.load(CONF / "text" / "released.yaml").max_length
        dataset, rows = recorded.dataset(text_length), recorded.rows()
        assert dataset.template.length <= min(expected)
        end = recorded.vocabulary.command("[EOI1]")
        for i in range(len(rows)):
            texts, codes = rows[i]
            text = [token for token in dataset[i].tokens if token in recorded.vocabulary.text_tokens]
            assert text == [
                recorded.vocabulary.text_tokens.start + text_token for text_token in texts["text"][:text_length]
            ]
            assert dataset[i].tokens[-codes.numel() - 1 :].tolist() == [*codes.flatten().tolist(), end]


class TestWriting:
    def write(self, folder: Path, recorded: Recorded, text_tokens: list[list[int]], codes: Tensor) -> Path:
        """A finished store; returns the file with its rows."""
        identities = {"text_tokenizer": "text", "image_tokenizer": "image"}
        splits = {"train": len(text_tokens)}
        writer = TokenStoreWriter(folder, **recorded.sizes, **identities, splits=splits, format=COGVIEW)
        writer.append(
            "train", {"text": text_tokens}, codes, [str(i) for i in range(len(text_tokens))], len(text_tokens)
        )
        writer.finish()
        return folder / "train.bin"

    def test_what_was_read_is_written_byte_for_byte(self, recorded, tmp_path) -> None:
        rows = recorded.rows()
        texts, codes = zip(*(rows[i] for i in range(len(rows))), strict=True)
        text_tokens = [text["text"] for text in texts]
        file = self.write(tmp_path, recorded, text_tokens, torch.stack(codes))
        assert file.read_bytes() == recorded.file.read_bytes()
        again = TokenStore.open(tmp_path).split("train")
        assert [again[i][0]["text"] for i in range(len(again))] == text_tokens
        assert all(torch.equal(again[i][1], codes[i]) for i in range(len(again)))

    def test_captions_and_codes_make_the_recorded_file(self, recorded, text_model, tmp_path) -> None:
        text, rows = TextTokenizer.load(text_model), recorded.rows()
        codes = torch.stack([rows[i][1] for i in range(len(rows))])
        file = self.write(tmp_path, recorded, [text.encode(caption) for caption in recorded.texts], codes)
        assert file.read_bytes() == recorded.file.read_bytes()
