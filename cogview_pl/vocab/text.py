"""Text to SentencePiece ids and back: load a `.model` file, or train a model on the captions of a data set."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece as spm

from cogview_pl.durable.read import why_unusable
from cogview_pl.durable.write import write_bytes
from cogview_pl.errors import UserError
from cogview_pl.vocab.config import TextConfig

_TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
_LONGEST = 4192
"""Longest caption in bytes that SentencePiece learns from; longer ones are given to it in parts."""


class TextTokenizer:
    """A SentencePiece model.

    A string such as `[BOI1]` becomes ordinary text tokens, so no text that a user types can become a command token (the
    ids of command tokens are not among the text tokens, see `vocabulary.py`).

    Args:
        serialized: the bytes of a `.model` file.
    """

    def __init__(self, serialized: bytes) -> None:
        self.serialized = serialized
        self._processor = spm.SentencePieceProcessor(model_proto=serialized)

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """Read a `.model` file. Raises UserError if it is missing or is no SentencePiece model."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"text.model={path} {why_unusable(path)}; give the path of a SentencePiece .model file")
        try:
            tokenizer = cls(path.read_bytes())
            if not tokenizer.serialized:
                raise RuntimeError("the file is empty")
            return tokenizer
        except (RuntimeError, OSError) as error:
            raise UserError(f"text.model={path} is not a SentencePiece model ({error})") from error

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        options: TextConfig,
        seed_sentences: int = 1_000_000,
    ) -> TextTokenizer:
        """Learn text tokens from captions; unknown characters become byte tokens.

        Args:
            captions: the training captions, of any length.
            options: `vocab_size` is the upper limit of the number of text tokens, with 256 byte tokens and 3 control
                tokens; `model_type` is `bpe` or `unigram`; `character_coverage` is the share of the characters in the
                captions that get a text token of their own.
            seed_sentences: largest number of captions to read; each part of a long one counts.

        Raises:
            UserError: there are no captions, or `vocab_size` is too small for their characters.
        """
        model = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=(part for caption in captions for part in _parts(caption)),
                model_writer=model,
                vocab_size=options.vocab_size,
                model_type=options.model_type,
                character_coverage=options.character_coverage,
                byte_fallback=True,
                hard_vocab_limit=False,  # few captions cannot fill a large vocabulary: then it is smaller
                split_by_whitespace=True,
                input_sentence_size=seed_sentences,
                shuffle_input_sentence=False,
                num_threads=1,  # the result must not depend on the machine
                bos_id=1,
                eos_id=2,
                unk_id=0,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(f"text.vocab_size={options.vocab_size} {_why_unsuitable(str(error))}") from error
        return cls(model.getvalue())

    @property
    def vocab_size(self) -> int:
        """Number of text token ids, 0 … vocab_size-1."""
        return self._processor.get_piece_size()

    @property
    def identity(self) -> str:
        """SHA-256 of the model file, equal for equal tokenizers only."""
        return hashlib.sha256(self.serialized).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Text token ids of a text, without begin or end marks. White space alone gives an empty list."""
        return self._processor.encode(text, out_type=int)

    def cut(self, text_tokens: Sequence[int], length: int) -> Sequence[int]:
        """The first text tokens, at most `length`, without the beginning of a character whose end is cut off.

        A character that the tokenizer does not know is several tokens, one for each of its bytes.
        """
        if len(text_tokens) <= length or not self._continues(text_tokens[length]):
            return text_tokens[:length]
        end = length - 1
        while end > 0 and self._continues(text_tokens[end]):
            end -= 1
        return text_tokens[:end]

    def _continues(self, text_token: int) -> bool:
        """Whether a token is a byte within a character of UTF-8, and not its first."""
        if not self._processor.is_byte(text_token):
            return False
        return int(self._processor.id_to_piece(text_token)[1:-1], 16) & 0xC0 == 0x80

    def decode(self, text_tokens: Sequence[int]) -> str:
        """The text of text token ids."""
        return self._processor.decode(list(text_tokens))

    def save(self, path: str | Path) -> None:
        """Write the `.model` file."""
        write_bytes(Path(path), self.serialized)


def _why_unsuitable(message: str) -> str:
    """What is wrong with `text.vocab_size`, out of SentencePiece's message."""
    too_small = _TOO_SMALL.search(message)
    if too_small is None:
        return f"does not suit the captions: {' '.join(message.split())}"
    return (
        f"is too small for the characters of the captions; set it to {too_small[1]} or more, or lower "
        "text.character_coverage, so that rare characters become bytes"
    )


def _parts(text: str) -> Iterator[str]:
    """A text in parts of at most `_LONGEST` bytes, cut between characters."""
    data = text.encode()
    start = 0
    while len(data) - start > _LONGEST:
        end = start + _LONGEST
        while data[end] & 0xC0 == 0x80:
            end -= 1
        yield data[start:end].decode()
        start = end
    yield data[start:].decode()
