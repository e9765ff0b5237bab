"""From choices to figures, by hand."""

from __future__ import annotations

import pytest

from bc2exp.evaluation.judgement import Choices, Method, Row, judge, said, table

WORDS = ["积极", "消极"]
ROWS = [Row("a", 0, "f.csv", 1), Row("b", 1, "f.csv", 2), Row("c", 1, "f.csv", 3), Row("d", 0, "f.csv", 4)]
BASE = Choices([[-1.0, -2.0]] * 4, ["积极", "积极的", " 消极\n", ""])
TUNED = Choices([[-1.0, -2.0], [-2.0, -1.0], [-2.0, -1.0], [-3.0, -1.0]], ["积极", "消极", "消极", "消极"])
METHOD = Method(resamples=500, confidence=0.9, seed=3)


def test_an_answer_is_a_word_or_nothing() -> None:
    assert [said(text, WORDS) for text in ("积极", " 消极\n", "积极的", "消极积极", "")] == [
        0,
        1,
        None,
        None,
        None,
    ]


def test_the_figures_of_two_models() -> None:
    found = judge(ROWS, {"base": BASE, "tuned": TUNED}, WORDS, METHOD)
    assert (found["rows"], found["counts"], found["majority"]) == (4, [2, 2], 0.5)
    base, tuned = found["models"]["base"], found["models"]["tuned"]
    assert base["likelihood"]["accuracy"]["value"] == 0.5
    assert base["likelihood"]["confusion"] == [[2, 0, 0], [2, 0, 0]]
    assert base["answers"]["accuracy"]["value"] == 0.5
    assert base["answers"]["free_form"] == 0.5
    assert base["answers"]["confusion"] == [[1, 0, 1], [0, 1, 1]]
    assert tuned["likelihood"]["f1"] == pytest.approx([2 / 3, 0.8])
    assert tuned["likelihood"]["macro_f1"]["value"] == pytest.approx((2 / 3 + 0.8) / 2)
    by_likelihood, by_answer = found["comparisons"]
    assert (by_likelihood["by"], by_likelihood["one"], by_likelihood["other"]) == (
        "likelihood",
        "base",
        "tuned",
    )
    assert (by_likelihood["only_one_right"], by_likelihood["only_other_right"]) == (1, 2)
    assert by_likelihood["difference"]["value"] == 0.25
    assert by_likelihood["p"] == 1.0
    assert (by_answer["only_one_right"], by_answer["only_other_right"]) == (0, 1)


def test_a_model_that_was_not_asked_is_judged_by_likelihood_alone() -> None:
    silent = Choices(TUNED.scores, None)
    found = judge(ROWS, {"silent": silent}, WORDS, METHOD)
    assert list(found["models"]["silent"]) == ["likelihood"]
    assert found["comparisons"] == []
    assert [line[2] for line in table(ROWS, {"silent": silent}, WORDS, "review")[1]] == [
        "积极",
        "消极",
        "消极",
        "消极",
    ]


def test_the_table_has_every_row_and_what_each_model_said() -> None:
    columns, lines = table(ROWS, {"base": BASE, "tuned": TUNED}, WORDS, "review")
    assert columns[:5] == ["review", "label", "base", "tuned", "base: likeliest"]
    assert columns[-2:] == ["file", "row"]
    assert lines[1][:5] == ["b", "消极", "积极的", "消极", "积极"]
    assert lines[3] == ["d", "积极", "", "消极", "积极", -1.0, -2.0, "消极", -3.0, -1.0, "f.csv", 4]
