"""The embedded texts are clean, and the shipped tokenizer is what its script trains from them."""

from __future__ import annotations

import csv
import re
from itertools import pairwise

import pytest
import sentencepiece

from bc2exp.embedded import CORPUS, REVIEWS, TOKENIZER, train_tokenizer

AWKWARD = [
    "",
    " ",
    "  two  spaces and three   inside  ",
    "\ta tab\t\tand two",
    "line\nline\r\n\n",
    "😀 👍🏽 👨‍👩‍👧",
    "龘鱻𠮷㐂",
    "ＡＢＣ　１２３",
    "e\u0301 is not \u00e9",
    "\x00\u200b\u2028\ufeff\ufffd\U0010ffff",
    "<s></s><unk><0x41>",
    "<reserved_106>你好<reserved_107>Hello",
    "3.14159, 2026年10月1日, 100%",
]


@pytest.fixture(scope="module")
def tokenizer():
    return sentencepiece.SentencePieceProcessor(model_proto=TOKENIZER.read_bytes())


def _reviews():
    with REVIEWS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["label", "review"]
    return rows[1:]


def _pieces(tokenizer):
    return [tokenizer.id_to_piece(index) for index in range(tokenizer.get_piece_size())]


def test_every_document_and_review_comes_back(tokenizer):
    documents = list(train_tokenizer.texts())
    lines = [line for path in CORPUS for line in path.read_text("utf-8").splitlines()]
    assert documents == lines + [review for _, review in _reviews()]
    encoded = tokenizer.encode(documents)
    assert [tokenizer.decode(ids) for ids in encoded] == documents
    assert tokenizer.unk_id() not in {index for ids in encoded for index in ids}


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_own_space_sign_is_the_one_exception(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_nothing_is_added_or_tidied(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.encode("cat", out_type=str)[0][0] == "c"
    assert "".join(tokenizer.encode("  cat ", out_type=str)) == "\u2581\u2581cat\u2581"


def test_control_ids_are_those_of_baichuan2(tokenizer):
    ids = (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id())
    assert ids == (0, 1, 2, -1)
    assert _pieces(tokenizer)[:3] == ["<unk>", "<s>", "</s>"]
    assert tokenizer.get_piece_size() == train_tokenizer.VOCAB_SIZE


def test_each_turn_opens_with_one_piece(tokenizer):
    for piece in ("<reserved_106>", "<reserved_107>"):
        index = tokenizer.piece_to_id(piece)
        assert index != tokenizer.unk_id()
        assert tokenizer.encode(f"a{piece}b", out_type=str) == ["a", piece, "b"]


def test_control_signs_in_a_text_are_plain_text(tokenizer):
    assert not {0, 1, 2} & set(tokenizer.encode("<unk><s></s>"))


def test_digits_stand_alone(tokenizer):
    pieces = tokenizer.encode("a 1234,56年7", out_type=str)
    assert [piece for piece in pieces if re.search(r"\d", piece)] == list("1234567")
    learned = [piece for piece in _pieces(tokenizer) if not piece.startswith("<")]
    assert sorted(piece for piece in learned if re.search(r"\d", piece)) == list("0123456789")


def test_every_byte_has_a_piece(tokenizer):
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(_pieces(tokenizer))


def test_the_shipped_file_is_what_the_script_trains(tmp_path, capsys):
    output = tmp_path / "tokenizer.model"
    train_tokenizer.main(["--output", str(output)])
    assert output.read_bytes() == TOKENIZER.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert f"{train_tokenizer.VOCAB_SIZE} pieces" in capsys.readouterr().out


def test_another_size_is_trained_on_request(tmp_path):
    output = tmp_path / "larger.model"
    train_tokenizer.main(["--output", str(output), "--vocab-size", "2500"])
    larger = sentencepiece.SentencePieceProcessor(model_proto=output.read_bytes())
    assert larger.get_piece_size() == 2500


def test_an_impossible_size_leaves_the_old_file(tmp_path, capsys):
    output = tmp_path / "tokenizer.model"
    output.write_bytes(b"old")
    with pytest.raises(SystemExit) as exit_:
        train_tokenizer.main(["--output", str(output), "--vocab-size", "100"])
    assert exit_.value.code == 1
    assert "vocab" in capsys.readouterr().err.lower()
    assert output.read_bytes() == b"old"


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_a_corpus_is_clean_lines(path):
    content = path.read_bytes().decode("utf-8")
    assert content.endswith("\n")
    lines = content[:-1].split("\n")
    assert len(lines) >= 250
    assert len(set(lines)) == len(lines)
    for line in lines:
        assert line
        assert line == line.strip()
        assert not set("\r\t\ufeff") & set(line)


def test_reviews_are_balanced_and_mixed():
    rows = _reviews()
    assert len(rows) >= 340
    assert {len(row) for row in rows} == {2}
    labels = [row[0] for row in rows]
    assert set(labels) == {"0", "1"}
    assert abs(labels.count("0") - labels.count("1")) <= 0.1 * len(labels)
    assert all(row[1].strip() for row in rows)
    changes = sum(first != second for first, second in pairwise(labels))
    assert changes >= len(labels) / 4, "the reviews are sorted by label"
