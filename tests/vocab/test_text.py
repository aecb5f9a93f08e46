"""The text tokenizer: round trips, identity, unreadable models, and text that looks like command tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cogview_pl.errors import UserError
from cogview_pl.vocab import COMMANDS, Template, TextTokenizer, Vocabulary

CAPTIONS = [
    f"{size}{colour}的{shape}在{place}"
    for size in ("大", "小")
    for colour in ("红色", "蓝色", "黄色")
    for shape in ("圆形", "方块", "三角形")
    for place in ("左边", "右边", "上面", "中间")
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, num_pieces=300)


@pytest.fixture(scope="module")
def template(tokenizer: TextTokenizer) -> Template:
    return Template(
        "[ROI1] {text} [BASE] [BOI1] {image:2x2} [EOI1]",
        target="image",
        loss={"text": 1.0, "image": 1.0},
        vocabulary=Vocabulary(num_codes=16, num_pieces=tokenizer.num_pieces),
        text_length=1000,
    )


class TestRoundTrip:
    def test_training_captions(self, tokenizer: TextTokenizer) -> None:
        assert [tokenizer.decode(tokenizer.encode(text)) for text in CAPTIONS] == CAPTIONS

    @pytest.mark.parametrize("model_type", ["bpe", "unigram"])
    @pytest.mark.parametrize("text", ["😀一个👩‍🚀", "龘䨺𠮷", "Ünïcödé ру́сский", "red circle, 2 of 3!", "<0x41>"])
    def test_characters_never_seen(self, text: str, model_type: str) -> None:
        tokenizer = TextTokenizer.train(CAPTIONS, num_pieces=300, model_type=model_type)
        pieces = tokenizer.encode(text)
        assert tokenizer.decode(pieces) == text
        assert all(0 <= piece < tokenizer.num_pieces for piece in pieces)
        assert 0 not in pieces  # no unknown piece: bytes stand in

    @pytest.mark.parametrize("text", ["", "   ", "\t\n"])
    def test_white_space_is_no_text(self, tokenizer: TextTokenizer, text: str) -> None:
        assert tokenizer.encode(text) == []

    def test_saved_and_loaded(self, tokenizer: TextTokenizer, tmp_path: Path) -> None:
        tokenizer.save(tmp_path / "text.model")
        loaded = TextTokenizer.load(tmp_path / "text.model")
        assert loaded.identity == tokenizer.identity
        assert loaded.num_pieces == tokenizer.num_pieces
        assert [loaded.encode(text) for text in CAPTIONS] == [tokenizer.encode(text) for text in CAPTIONS]


class TestTraining:
    def test_same_captions_same_identity(self, tokenizer: TextTokenizer) -> None:
        assert TextTokenizer.train(iter(CAPTIONS), num_pieces=300).identity == tokenizer.identity

    def test_other_captions_other_identity(self, tokenizer: TextTokenizer) -> None:
        assert TextTokenizer.train(["一只猫", "两只狗"], num_pieces=300).identity != tokenizer.identity

    def test_number_of_pieces_is_a_limit(self) -> None:
        assert TextTokenizer.train(CAPTIONS, num_pieces=290).num_pieces == 290
        assert TextTokenizer.train(["一只猫"], num_pieces=2000).num_pieces < 300

    @pytest.mark.parametrize(("captions", "num_pieces"), [([], 300), (CAPTIONS, 100)])
    def test_unsuitable_captions(self, captions: list[str], num_pieces: int) -> None:
        with pytest.raises(UserError, match=rf"^text\.num_pieces={num_pieces} [^\n]+$"):
            TextTokenizer.train(captions, num_pieces=num_pieces)


class TestUnreadableModel:
    def test_missing(self, tmp_path: Path) -> None:
        file = tmp_path / "none.model"
        with pytest.raises(UserError, match=r"^text\.model=[^\n]*none\.model does not exist[^\n]+$"):
            TextTokenizer.load(file)

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"^text\.model=[^\n]+$"):
            TextTokenizer.load(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"garbage\nof two lines", bytes(range(256)) * 4], ids=len)
    def test_garbage(self, content: bytes, tmp_path: Path) -> None:
        file = tmp_path / "bad.model"
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"^text\.model=[^\n]*bad\.model is not a SentencePiece model[^\n]*$"):
            TextTokenizer.load(file)

    def test_cut_off(self, tokenizer: TextTokenizer, tmp_path: Path) -> None:
        file = tmp_path / "cut.model"
        file.write_bytes(tokenizer.serialized[: len(tokenizer.serialized) // 2])
        with pytest.raises(UserError, match=r"^text\.model=[^\n]+$"):
            TextTokenizer.load(file)


class TestTextNeverBecomesACommand:
    """Whatever a user types, the text slot holds pieces and the layout's own command tokens stay alone."""

    SPECIAL = (*COMMANDS, "<s>", "</s>", "<unk>", "<pad>", "[ROI1] {text} [BASE]", "{image:2x2}", "\x00", "▁")

    def hostile_captions(self) -> list[str]:
        rng = random.Random(0)
        texts = [*self.SPECIAL, "".join(self.SPECIAL), " ".join(self.SPECIAL), "[BOI1] [EOI1] [PAD]"]
        for _ in range(300):
            words = rng.choices((*self.SPECIAL, "红色", "的", " ", "😀", "[", "]"), k=rng.randint(1, 12))
            texts.append(rng.choice(("", " ", "的")).join(words))
        texts += ["".join(chr(rng.randrange(1, 0xD800)) for _ in range(20)) for _ in range(100)]
        return texts

    def test_encodes_to_pieces(self, tokenizer: TextTokenizer) -> None:
        for text in self.hostile_captions():
            assert all(0 <= piece < tokenizer.num_pieces for piece in tokenizer.encode(text)), text

    def test_even_if_the_tokenizer_learned_from_such_captions(self) -> None:
        tokenizer = TextTokenizer.train([*CAPTIONS, *COMMANDS * 20], num_pieces=340)
        for text in self.hostile_captions():
            pieces = tokenizer.encode(text)
            assert all(0 <= piece < tokenizer.num_pieces for piece in pieces), text
            assert not {1, 2} & set(pieces), text  # begin and end marks of SentencePiece

    def test_training_sequence(self, tokenizer: TextTokenizer, template: Template) -> None:
        vocabulary = template.vocabulary
        commands = [vocabulary.command(name) for name in ("[ROI1]", "[BASE]", "[BOI1]", "[EOI1]")]
        for text in self.hostile_captions():
            tokens = template.build({"text": tokenizer.encode(text), "image": [0, 1, 2, 3]}).tokens
            assert [token for token in tokens if token >= vocabulary.pieces.stop] == commands, text

    def test_prompt(self, tokenizer: TextTokenizer, template: Template) -> None:
        vocabulary = template.vocabulary
        for text in self.hostile_captions():
            start, *pieces, base, boi = template.prompt({"text": tokenizer.encode(text)})
            assert [start, base, boi] == [vocabulary.command(name) for name in ("[ROI1]", "[BASE]", "[BOI1]")]
            assert all(piece in vocabulary.pieces for piece in pieces), text
