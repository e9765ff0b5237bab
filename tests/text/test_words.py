"""Ids word by word are SentencePiece's own, for every text; models of which that is not so are left alone."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow.parquet
import pytest
import sentencepiece

from bc2exp.embedded import TOKENIZER
from bc2exp.text import words as words_module
from bc2exp.text.tokenizer import Tokenizer
from bc2exp.text.words import find_words
from tests.shared_data import shared_data

GENUINE = "tokenizer/baichuan2_tokenizer.model"
PARTS = (
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r",
        ".",
        "..",
        ",",
        "?",
        "!",
        "'s",
        "<s>",
        "</s>",
        "<h2>",
        "7",
        "42",
        "3.14",
    ),
    *(
        "the",
        "The",
        " a",
        "word",
        "don't",
        "送餐",
        "很",
        "，",
        "。",
        "　",
        "\u00a0",
        "\u2581",
        "a\u2581b",
        "é",
        "e\u0301",
    ),
    *("😀", "\u0000", "𠮷", "#", "###", "()", "<reserved_106>", "//", "www.x.com", "\u3000\u3000"),
)


def processor_of(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def assert_same(processor: sentencepiece.SentencePieceProcessor, texts: list[str]) -> None:
    words = find_words(processor)
    assert words is not None
    for text in texts:
        assert list(words.encode(text.encode())) == list(processor.encode(text)), repr(text)


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(PARTS, k=draw.randrange(12))) for _ in range(count)]


def test_random_texts_with_the_embedded_model():
    assert_same(processor_of(TOKENIZER), random_texts(20000))


def test_random_texts_with_the_genuine_model():
    assert_same(processor_of(shared_data(GENUINE)), random_texts(20000))


def test_real_texts_with_the_genuine_model():
    table = pyarrow.parquet.read_table(shared_data("train-00000-of-00001-a09b74b3ef9c3b56.parquet"))
    reviews = shared_data("waimai_10k.csv").read_text("utf-8").splitlines()
    assert_same(processor_of(shared_data(GENUINE)), [*table["text"].to_pylist()[:5000], *reviews])


def test_words_that_are_kept_have_a_limit(monkeypatch):
    monkeypatch.setattr(words_module, "MOST_KEPT", 8)
    monkeypatch.setattr(words_module, "LONGEST_KEPT", 5)
    words = find_words(processor_of(TOKENIZER))
    plain = processor_of(TOKENIZER)
    for text in [*random_texts(300), "one longer words two"]:
        assert list(words.encode(text.encode())) == list(plain.encode(text))
        assert len(words) <= 8
        assert max(map(len, words), default=0) <= 5


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"split_by_whitespace": False},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["a b"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_model_with_other_spaces_is_asked_for_whole_texts(options, kind, tmp_path):
    lines = [
        "the cat sat on the mat and the dog sat on the cat",
        "a b a b c d a b",
        "in the end of the day",
    ] * 40
    plain = {
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "model"),
        vocab_size=40,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**plain, **options},
    )
    processor = processor_of(tmp_path / "model.model")
    assert find_words(processor) is None
    texts = ["the cat", " the  cat ", "on the mat and a b", ""]
    found = Tokenizer(tmp_path / "model.model").encode_documents(texts)
    assert [list(ids) for ids in found] == [list(processor.encode(text)) for text in texts]
