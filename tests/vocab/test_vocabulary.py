"""The joint vocabulary: released ids, ranges that tile it, unknown names."""

from __future__ import annotations

import pytest

from cogview_pl.vocab import COMMANDS, Vocabulary


def test_released_ids() -> None:
    # What the published weights were trained with: 8,192 codes and 50,000 text tokens.
    vocabulary = Vocabulary(codebook_size=8192, text_vocab_size=50000)
    assert " ".join(sorted(COMMANDS, key=vocabulary.command)) == (
        "[PAD] [BOI1] [BOI2] [BOI3] [EOI1] [EOI2] [EOI3] [ROI1] [ROI2] [ROI3] [SEP] [MASK] [CLS] [ENC] "
        "[TINY] [SMALL] [BASE] [BIG] [POS0] [POS1] [POS2] [POS3] [POS4] [POS5] [POS6] [POS7] [POS8]"
    )
    expected = {"[BOI1]": 58193, "[EOI1]": 58196, "[ROI1]": 58199, "[ROI2]": 58200, "[BASE]": 58208, "[POS0]": 58210}
    assert {name: vocabulary.command(name) for name in expected} == expected
    assert vocabulary.pad == 58192
    assert vocabulary.codes == range(8192)
    assert vocabulary.text_tokens == range(8192, 58192)
    assert vocabulary.num_tokens == 58219
    assert vocabulary.size == 58240


@pytest.mark.parametrize(("codebook_size", "text_vocab_size"), [(8192, 50000), (16, 300), (1, 1), (100, 5)])
def test_ranges_tile_the_ids_without_gap_or_overlap(codebook_size: int, text_vocab_size: int) -> None:
    vocabulary = Vocabulary(codebook_size, text_vocab_size)
    commands = [vocabulary.command(name) for name in COMMANDS]
    assert [*vocabulary.codes, *vocabulary.text_tokens, *commands] == list(range(vocabulary.num_tokens))
    assert len(vocabulary.codes) == codebook_size
    assert len(vocabulary.text_tokens) == text_vocab_size


@pytest.mark.parametrize("multiple", [1, 64, 128])
def test_table_is_padded_to_the_next_multiple(multiple: int) -> None:
    for text_vocab_size in range(1, 300):
        vocabulary = Vocabulary(8, text_vocab_size, multiple=multiple)
        assert vocabulary.size % multiple == 0
        assert 0 <= vocabulary.size - vocabulary.num_tokens < multiple


@pytest.mark.parametrize("name", ["[BOI9]", "BOI1", "[boi1]", ""])
def test_unknown_command(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown command token.*\[BOI1\]"):
        Vocabulary(8, 8).command(name)
