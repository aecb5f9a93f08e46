"""The text tokenizer: round trips, identity, unreadable models, and text that looks like command tokens."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2

from cogview_pl.errors import UserError
from cogview_pl.vocab import COMMANDS, Template, TextTokenizer, Vocabulary

from ..texts import learned_text

CAPTIONS = [
    f"{size}{colour}的{shape}在{place}"
    for size in ("大", "小")
    for colour in ("红色", "蓝色", "黄色")
    for shape in ("圆形", "方块", "三角形")
    for place in ("左边", "右边", "上面", "中间")
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return learned_text(CAPTIONS, vocab_size=300)


@pytest.fixture(scope="module")
def template(tokenizer: TextTokenizer) -> Template:
    return Template(
        "[ROI1] {text} [BASE] [BOI1] {image:2x2} [EOI1]",
        target="image",
        loss={"text": 1.0, "image": 1.0},
        vocabulary=Vocabulary(codebook_size=16, text_vocab_size=tokenizer.vocab_size),
        text_length=1000,
    )


class TestRoundTrip:
    def test_training_captions(self, tokenizer: TextTokenizer) -> None:
        assert [tokenizer.decode(tokenizer.encode(text)) for text in CAPTIONS] == CAPTIONS

    @pytest.mark.parametrize("model_type", ["bpe", "unigram"])
    @pytest.mark.parametrize("text", ["😀一个👩‍🚀", "龘䨺𠮷", "Ünïcödé ру́сский", "red circle, 2 of 3!", "<0x41>"])
    def test_characters_never_seen(self, text: str, model_type: str) -> None:
        tokenizer = learned_text(CAPTIONS, vocab_size=300, model_type=model_type)
        text_tokens = tokenizer.encode(text)
        assert tokenizer.decode(text_tokens) == text
        assert all(0 <= text_token < tokenizer.vocab_size for text_token in text_tokens)
        assert 0 not in text_tokens  # no unknown text token: bytes stand in

    @pytest.mark.parametrize("text", ["", "   ", "\t\n"])
    def test_white_space_is_no_text(self, tokenizer: TextTokenizer, text: str) -> None:
        assert tokenizer.encode(text) == []

    def test_saved_and_loaded(self, tokenizer: TextTokenizer, tmp_path: Path) -> None:
        tokenizer.save(tmp_path / "text.model")
        loaded = TextTokenizer.load(tmp_path / "text.model")
        assert loaded.identity == tokenizer.identity
        assert loaded.vocab_size == tokenizer.vocab_size
        assert [loaded.encode(text) for text in CAPTIONS] == [tokenizer.encode(text) for text in CAPTIONS]


class TestTraining:
    def test_same_captions_same_identity(self, tokenizer: TextTokenizer) -> None:
        assert learned_text(iter(CAPTIONS), vocab_size=300).identity == tokenizer.identity

    def test_other_captions_other_identity(self, tokenizer: TextTokenizer) -> None:
        assert learned_text(["一只猫", "两只狗"], vocab_size=300).identity != tokenizer.identity

    def test_number_of_pieces_is_a_limit(self) -> None:
        assert learned_text(CAPTIONS, vocab_size=290).vocab_size == 290
        assert learned_text(["一只猫"], vocab_size=2000).vocab_size < 300

    @pytest.mark.parametrize(("captions", "vocab_size"), [([], 300), (CAPTIONS, 100)])
    def test_unsuitable_captions(self, captions: list[str], vocab_size: int) -> None:
        with pytest.raises(UserError, match=rf"^text\.vocab_size={vocab_size} [^\n]+$"):
            learned_text(captions, vocab_size=vocab_size)

    def test_the_error_names_the_smallest_size(self) -> None:
        with pytest.raises(UserError, match=r"is too small for the characters") as error:
            learned_text(CAPTIONS, vocab_size=100)
        smallest = int(str(error.value).partition("set it to ")[2].split()[0])
        assert learned_text(CAPTIONS, vocab_size=smallest).vocab_size == smallest
        with pytest.raises(UserError, match=rf"set it to {smallest} or more"):
            learned_text(CAPTIONS, vocab_size=smallest - 1)


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
    """Whatever a user types, the text slot holds text tokens and the layout's own command tokens stay alone."""

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
            assert all(0 <= text_token < tokenizer.vocab_size for text_token in tokenizer.encode(text)), text

    def test_even_if_the_tokenizer_learned_from_such_captions(self) -> None:
        tokenizer = learned_text([*CAPTIONS, *COMMANDS * 20], vocab_size=340)
        for text in self.hostile_captions():
            text_tokens = tokenizer.encode(text)
            assert all(0 <= text_token < tokenizer.vocab_size for text_token in text_tokens), text
            assert not {1, 2} & set(text_tokens), text  # begin and end marks of SentencePiece

    def test_training_sequence(self, tokenizer: TextTokenizer, template: Template) -> None:
        vocabulary = template.vocabulary
        commands = [vocabulary.command(name) for name in ("[ROI1]", "[BASE]", "[BOI1]", "[EOI1]")]
        for text in self.hostile_captions():
            tokens = template.build({"text": tokenizer.encode(text), "image": [0, 1, 2, 3]}).tokens.tolist()
            assert [token for token in tokens if token >= vocabulary.text_tokens.stop] == commands, text

    def test_prompt(self, tokenizer: TextTokenizer, template: Template) -> None:
        vocabulary = template.vocabulary
        for text in self.hostile_captions():
            start, *text_tokens, base, boi = template.prompt({"text": tokenizer.encode(text)})
            assert [start, base, boi] == [vocabulary.command(name) for name in ("[ROI1]", "[BASE]", "[BOI1]")]
            assert all(text_token in vocabulary.text_tokens for text_token in text_tokens), text


def learned(tokenizer: TextTokenizer) -> set[str]:
    """The text tokens behind those that every tokenizer has."""
    names = spm.SentencePieceProcessor(model_proto=tokenizer.serialized)
    return {names.id_to_piece(i) for i in range(3 + 256, tokenizer.vocab_size)}


class TestCut:
    """Texts that are longer than a slot end with a whole character."""

    @pytest.mark.parametrize("text", ["红𠮷猫龘", "龘龘龘", "é𠮷"])
    def test_no_character_is_cut(self, tokenizer: TextTokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        for length in range(len(ids) + 2):
            kept = tokenizer.cut(ids, length)
            assert len(kept) <= length and list(kept) == ids[: len(kept)]
            decoded = tokenizer.decode(kept)
            assert text.startswith(decoded) and "\ufffd" not in decoded
            assert len(kept) > length - 4 or len(kept) == len(ids)

    def test_known_characters_are_cut_anywhere(self, tokenizer: TextTokenizer) -> None:
        ids = tokenizer.encode("红红红红大大")
        assert [list(tokenizer.cut(ids, length)) for length in range(len(ids))] == [
            ids[:length] for length in range(len(ids))
        ]


class TestWhatIsLearned:
    """What a user may count on of the text tokens of a new tokenizer."""

    def test_control_pieces_then_bytes_then_the_characters(self, tokenizer: TextTokenizer) -> None:
        names = spm.SentencePieceProcessor(model_proto=tokenizer.serialized)
        first = [names.id_to_piece(i) for i in range(3 + 256)]
        assert first == ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        assert names.pad_id() == -1
        assert {"大", "红", "▁"} < learned(tokenizer)

    def test_pieces_end_at_a_space(self) -> None:
        tokenizer = learned_text(["ab cd"] * 50 + ["ab", "cd", "abc"], vocab_size=290)
        text_tokens = learned(tokenizer)
        assert "▁ab" in text_tokens and not [text_token for text_token in text_tokens if "▁" in text_token[1:]]

    def test_it_reads_the_first_captions_only(self) -> None:
        captions = [*["一只猫"] * 100, "两只狗", *["白马"] * 100]
        text_tokens = learned(learned_text(captions, vocab_size=300, seed_sentences=101))
        assert {"猫", "狗"} < text_tokens and "马" not in text_tokens

    def test_long_captions_count_and_are_cut_between_characters(self) -> None:
        """SentencePiece passes over what is longer than 4,192 bytes."""
        rare = "龘靐齉爩"
        captions = ["红猫"] * 50 + [start + rare * 900 for start in ("", "a", "ab")]
        assert set(rare) < learned(learned_text(captions, vocab_size=300))
        assert set(rare) < learned(learned_text(captions[50:51], vocab_size=300))

    def test_a_caption_of_the_usual_length_is_learned_whole(self) -> None:
        longest = "红猫" * 698 + "abcd"
        assert len(longest.encode()) == 4192
        whole, cut = (learned_text([text], vocab_size=400).identity for text in (longest, longest + "e"))
        assert whole != cut

    def test_every_character_has_a_piece_unless_less_is_asked_for(self) -> None:
        captions = ["天" * 300 + "地"]
        assert "地" in learned(learned_text(captions, vocab_size=300))
        assert "地" not in learned(learned_text(captions, vocab_size=300, character_coverage=0.99))

    def test_the_default_is_byte_pair_encoding(self, tokenizer: TextTokenizer) -> None:
        same, other = (learned_text(CAPTIONS, vocab_size=300, model_type=kind) for kind in ("bpe", "unigram"))
        assert same.identity == tokenizer.identity != other.identity

    def test_one_thread_and_a_million_captions_are_in_the_recipe(self, tokenizer: TextTokenizer) -> None:
        """The model file holds its recipe: what was learned from the same captions is the same on every machine."""
        recipe = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.serialized).trainer_spec
        assert recipe.num_threads == 1
        assert recipe.input_sentence_size == 1_000_000
        assert not recipe.shuffle_input_sentence
        assert not recipe.hard_vocab_limit

    def test_nothing_is_printed(self, capfd: pytest.CaptureFixture[str]) -> None:
        learned_text(CAPTIONS, vocab_size=300)
        assert capfd.readouterr() == ("", "")

    def test_a_folder_and_a_pipe_are_told_from_what_is_missing(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.model")
        for name, kind in ((".", "a folder"), ("pipe.model", "a named pipe")):
            with pytest.raises(UserError, match=rf"is {kind}; give the path of a SentencePiece \.model file$"):
                TextTokenizer.load(tmp_path / name)
        with pytest.raises(UserError, match=r"is not a SentencePiece model \(the file is empty\)$"):
            (tmp_path / "empty.model").touch()
            TextTokenizer.load(str(tmp_path / "empty.model"))

    def test_the_identity_is_that_of_the_file(self, tokenizer: TextTokenizer, tmp_path: Path) -> None:
        tokenizer.save(str(tmp_path / "text.model"))
        data = (tmp_path / "text.model").read_bytes()
        assert data == tokenizer.serialized
        assert tokenizer.identity == hashlib.sha256(data).hexdigest()

    @pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose beginning no one can read")
    def test_a_file_that_the_system_does_not_read_is_no_model(self) -> None:
        with pytest.raises(UserError, match=r"^text\.model=/proc/self/mem is not a SentencePiece model \(.*Input/outp"):
            TextTokenizer.load("/proc/self/mem")
