"""The joint vocabulary of the sequence model: the meaning of each id.

    0 … codebook_size-1                                  image codes
    codebook_size … codebook_size+text_vocab_size-1      text tokens
    then one id for each command token                   COMMANDS, in this order
    up to size-1                                         padding rows: no valid ids, they round the table up

With 8,192 codes and 50,000 text tokens these are the ids of the released CogView models.
"""

from __future__ import annotations

from dataclasses import dataclass

COMMANDS = (
    "[PAD]",
    *("[BOI1]", "[BOI2]", "[BOI3]", "[EOI1]", "[EOI2]", "[EOI3]"),
    *("[ROI1]", "[ROI2]", "[ROI3]"),
    *("[SEP]", "[MASK]", "[CLS]", "[ENC]"),
    *("[TINY]", "[SMALL]", "[BASE]", "[BIG]"),
    *(f"[POS{i}]" for i in range(9)),
)


@dataclass(frozen=True)
class Vocabulary:
    """Id ranges of the joint vocabulary.

    Args:
        codebook_size: size of the image tokenizer's codebook.
        text_vocab_size: number of SentencePiece ids.
        multiple: the table of embeddings is padded to a multiple of this many rows.
    """

    codebook_size: int
    text_vocab_size: int
    multiple: int = 128

    @property
    def codes(self) -> range:
        """Ids of the image codes."""
        return range(self.codebook_size)

    @property
    def text_tokens(self) -> range:
        """Ids of the text tokens."""
        return range(self.codebook_size, self.codebook_size + self.text_vocab_size)

    @property
    def num_tokens(self) -> int:
        """Number of valid ids."""
        return self.codebook_size + self.text_vocab_size + len(COMMANDS)

    @property
    def size(self) -> int:
        """Rows of the embedding table, V: `num_tokens` rounded up."""
        return -(-self.num_tokens // self.multiple) * self.multiple

    @property
    def pad(self) -> int:
        """Id of `[PAD]`."""
        return self.command("[PAD]")

    def command(self, name: str) -> int:
        """Id of a command token such as `[BOI1]`; raises ValueError for an unknown name."""
        if name not in COMMANDS:
            raise ValueError(f"unknown command token {name}; the known ones are {' '.join(COMMANDS)}")
        return self.codebook_size + self.text_vocab_size + COMMANDS.index(name)
