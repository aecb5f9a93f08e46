"""The joint vocabulary of the sequence model: which id means what.

    0 … num_codes-1                        image codes
    num_codes … num_codes+num_pieces-1     text pieces
    then one id for each command token     COMMANDS, in this order
    up to size-1                           padding rows: never valid, they only round the table up

With 8,192 codes and 50,000 pieces these are the ids of the released CogView models.
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
        num_codes: size of the image tokenizer's codebook.
        num_pieces: number of SentencePiece ids.
        multiple: the table of embeddings is padded to a multiple of this many rows.
    """

    num_codes: int
    num_pieces: int
    multiple: int = 128

    @property
    def codes(self) -> range:
        """Ids of the image codes."""
        return range(self.num_codes)

    @property
    def pieces(self) -> range:
        """Ids of the text pieces."""
        return range(self.num_codes, self.num_codes + self.num_pieces)

    @property
    def num_tokens(self) -> int:
        """Number of valid ids."""
        return self.num_codes + self.num_pieces + len(COMMANDS)

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
        return self.num_codes + self.num_pieces + COMMANDS.index(name)
