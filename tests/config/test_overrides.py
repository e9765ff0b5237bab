"""What a person types reaches the configuration as typed: quoting, sweeps, null, interpolation."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig

from bc2exp.config.overrides import (
    assign,
    parse,
    parse_word,
    quote,
    quote_choice,
    quote_text,
    read_word,
    split_sweep,
)
from bc2exp.config.preflight import preflight
from bc2exp.config.roots import data_root

PIECES = [
    *"'\"\\ ,=:[]{}()~#%&*?!@^|;<>/.+-$\t\n",
    "数据",
    "，",
    "é",
    "1e3",
    "null",
    "true",
    "a",
    "0",
    "choice(",
]


def random_texts(number: int) -> list[str]:
    """Texts of awkward pieces; `${` is left out, as it refers to another key."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(PIECES, k=draw.randint(1, 9))) for _ in range(number)]
    return [text for text in texts if "${" not in text]


AWKWARD = [
    "./数据/外卖.csv",
    "a=b.csv",
    "你好,世界",
    "~",
    "~/x.csv",
    "train(1).csv",
    "1e3",
    "007",
    "true",
    "a b",
    " a ",
    "it's",
    "'",
    '"',
    "'a' 'b'",
    "\\",
    "C:\\数据\\",
    "a\\'b\\\\",
    "[1,2]",
    "{a:1}",
    "key: value",
    "#1",
    "$HOME",
    "a\nb",
    "glob(*)",
]


def text_of(typed: str) -> object:
    """What Hydra reads where `typed` stands for text."""
    return parse(f"key={quote_text(typed)}").value()


@pytest.mark.parametrize("typed", AWKWARD)
def test_text_survives_hydras_grammar(typed: str) -> None:
    assert text_of(typed) == typed


def test_any_text_survives_hydras_grammar() -> None:
    texts = random_texts(1000)
    assert len(set(texts)) > 800
    for text in texts:
        assert parse(f"key={quote(text)}").value() == text


def test_text_reaches_the_configuration(composed: Callable[..., DictConfig]) -> None:
    config = composed()
    for typed in [*AWKWARD, *random_texts(300)]:
        if typed.strip():
            assert assign(config, "tracking.run_name", parse(f"key={quote(typed)}").value()) is None
            assert config.tracking.run_name == typed


@pytest.mark.parametrize("typed", ["1e3", "./数据/a=b,(1).csv", "'a' \\"])
def test_text_passes_the_preflight(typed: str, untouched: Path) -> None:
    result = preflight([f"tracking.run_name={typed}"], sweep=False, folder=untouched)
    assert not result.problems
    assert result.jobs[0].tracking.run_name == typed


@pytest.mark.parametrize(
    "words",
    [
        ["tracking.run_name=你好,世界", "dataset=embedded_reviews", "task.optimizer.lr=1e-2"],
        ["model=tiny_13b", "hardware=2cpu", "model.name=百川", "dataset.split=[8,1,1]", "task.epochs=null"],
        ["seed=${model.num_heads}", "tracking.run_name=${model.name}, ${seed}", "tracking.enabled=no"],
        ["task=sync", "task.run=./运行/a=b"],
    ],
)
def test_a_job_is_what_hydra_composes_from_the_quoted_words(words: list[str], untouched: Path) -> None:
    result = preflight(words, sweep=False, folder=untouched)
    assert not result.problems
    with initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        assert compose("config", overrides=result.overrides) == result.jobs[0]


@pytest.mark.parametrize("typed", ["'a b'", '"a,b"', "'it\\'s'", "'null'"])
def test_what_the_user_quoted_is_kept(typed: str) -> None:
    assert quote_text(typed) == typed
    assert text_of(typed) == typed[1:-1].replace("\\'", "'")


def test_null_is_no_text() -> None:
    assert text_of("null") is None
    assert text_of("NULL") is None
    assert text_of("nullable") == "nullable"


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("a, b", ["a", "b"]),
        ("你好,世界", ["你好", "世界"]),
        ("'你好,世界',b", ["'你好,世界'", "b"]),
        ('a,"b,c",d', ["a", '"b,c"', "d"]),
        ("it's,b", ["it's", "b"]),
        ("./a=b(1).csv,~/c.csv", ["./a=b(1).csv", "~/c.csv"]),
        ("${oc.env:A,b},c", ["${oc.env:A,b}", "c"]),
        ("${oc.env:A,${seed}},c", ["${oc.env:A,${seed}}", "c"]),
        ("choice(a b,'c,d')", ["a b", "'c,d'"]),
        ("a,,b", ["a", "", "b"]),
        ("a,", ["a", ""]),
        ("", [""]),
    ],
)
def test_commas_separate_the_values_of_a_sweep(typed: str, values: list[str]) -> None:
    assert split_sweep(typed) == values


def test_a_sweep_of_text_is_quoted_value_by_value() -> None:
    reading = read_word(parse_word("k=a=b.csv,'c,d',null"), quote_text, sweep=True)
    assert reading.text == "k='a=b.csv','c,d',null"
    assert reading.jobs == ("k='a=b.csv'", "k='c,d'", "k=null")
    assert list(parse(reading.text).sweep_string_iterator()) == ["'a=b.csv'", "'c,d'", "null"]


def test_a_comma_is_text_without_m() -> None:
    reading = read_word(parse_word("k=a,b"), quote_text, sweep=False)
    assert reading.jobs == ("k='a,b'",)


@pytest.mark.parametrize(
    ("typed", "jobs"),
    [
        ("1,2", ("k=1", "k=2")),
        ("range(1,4)", ("k=1", "k=2", "k=3")),
        ("choice(1e-3,2e-3)", ("k=0.001", "k=0.002")),
        ("interval(1,2)", ("k=1.0", "k=2.0")),
        ("[1,2],[3,4]", ("k=[1,2]", "k=[3,4]")),
        ("3", ("k=3",)),
    ],
)
def test_a_sweep_of_numbers_is_left_to_hydra(typed: str, jobs: tuple[str, ...]) -> None:
    reading = read_word(parse_word(f"k={typed}"), None, sweep=True)
    assert reading.text == f"k={typed}"
    assert reading.jobs == jobs
    assert reading.interval is typed.startswith("interval")


def test_several_numbers_need_m() -> None:
    with pytest.raises(ValueError, match="need -m"):
        read_word(parse_word("k=1,2"), None, sweep=False)
    with pytest.raises(HydraException):
        read_word(parse_word("k=1,"), None, sweep=True)


def test_a_choice_is_quoted_only_where_it_must_be() -> None:
    assert quote_choice("tiny_7b") == "tiny_7b"
    assert quote_choice("study/a-1.b") == "study/a-1.b"
    assert parse(f"dataset={quote_choice('外卖')}").value() == "外卖"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.b=c", ("", "a.b", "c")),
        ("a=b=c", ("", "a", "b=c")),
        ("a=", ("", "a", "")),
        ("a", ("", "a", None)),
        ("~a", ("~", "a", None)),
        ("++a=1", ("++", "a", "1")),
        ("=1", ("", "", "1")),
        ("a=b\nc", ("", "a", "b\nc")),
    ],
)
def test_a_word_is_split_at_its_first_equals_sign(text: str, parts: tuple[str, str, str | None]) -> None:
    word = parse_word(text)
    assert (word.prefix, word.key, word.value) == parts
