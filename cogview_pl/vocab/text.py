"""Text to SentencePiece ids and back: load any `.model`, or train one on the captions of a data set."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece as spm

from cogview_pl.durable.read import why_unusable
from cogview_pl.durable.write import write_bytes
from cogview_pl.errors import UserError


class TextTokenizer:
    """A SentencePiece model.

    It knows text only: a string such as `[BOI1]` is broken into ordinary text tokens, so nothing that a user types can
    become a command token (those ids lie outside the text tokens, see `vocabulary.py`).

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
        *,
        vocab_size: int,
        model_type: str = "bpe",
        character_coverage: float = 1.0,
        seed_sentences: int = 1_000_000,
    ) -> TextTokenizer:
        """Learn text tokens from captions; bytes stand in for characters that it has never seen.

        Args:
            captions: the training captions.
            vocab_size: upper limit of the number of text tokens, the 256 byte tokens and 3 control tokens included.
            model_type: `bpe` or `unigram`.
            character_coverage: share of the characters in the captions that get a text token of their own.
            seed_sentences: at most this many captions are read.

        Raises:
            UserError: there are no captions, or `vocab_size` is too small for their characters.
        """
        model = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(captions),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=character_coverage,
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
            reason = " ".join(str(error).split())
            raise UserError(f"text.vocab_size={vocab_size} does not suit the captions: {reason}") from error
        return cls(model.getvalue())

    @property
    def vocab_size(self) -> int:
        """Number of text token ids, 0 … vocab_size-1."""
        return self._processor.get_piece_size()

    @property
    def identity(self) -> str:
        """SHA-256 of the model file: two tokenizers are the same if and only if this is."""
        return hashlib.sha256(self.serialized).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Text token ids of a text, without begin or end marks. White space alone gives an empty list."""
        return self._processor.encode(text, out_type=int)

    def decode(self, text_tokens: Sequence[int]) -> str:
        """The text of text token ids."""
        return self._processor.decode(list(text_tokens))

    def save(self, path: str | Path) -> None:
        """Write the `.model` file."""
        write_bytes(Path(path), self.serialized)
