"""The report of an evaluation, from its files alone: tables, comparisons, the picture."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
from matplotlib import image
from matplotlib.font_manager import FontProperties
from rich.console import Console

from bc2exp.report import confusion
from bc2exp.report.evaluation import summarize_evaluation, tables


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def figures(accuracy: float, confusion: list[list[int]], free: float) -> dict:
    return {
        "accuracy": estimate(accuracy),
        "macro_f1": estimate(accuracy - 0.1),
        "f1": [0.5, 0.25],
        "confusion": confusion,
        "free_form": free,
    }


REPORT = {
    "dataset": "reviews",
    "kind": "classification",
    "losses": {"base": {"loss": 7.5, "perplexity": 1808.0}, "tuned": {"loss": 0.25, "perplexity": 1.284}},
    "rows": 8,
    "words": ["积极", "消极"],
    "labels": ["1", "0"],
    "counts": [5, 3],
    "majority": 0.625,
    "confidence": 0.95,
    "shown": 2,
    "generated": True,
    "models": {
        "base": {
            "likelihood": figures(0.5, [[3, 2, 0], [2, 1, 0]], 0.0),
            "answers": figures(0.0, [[0, 0, 5], [0, 0, 3]], 1.0),
        },
        "tuned": {
            "likelihood": figures(0.875, [[4, 1, 0], [0, 3, 0]], 0.0),
            "answers": figures(0.75, [[4, 0, 1], [1, 2, 0]], 0.125),
        },
    },
    "comparisons": [
        {
            "by": "answers",
            "one": "base",
            "other": "tuned",
            "difference": {"value": 0.75, "low": 0.5, "high": 0.9},
            "only_one_right": 0,
            "only_other_right": 6,
            "p": 0.03125,
        }
    ],
}
TABLE = {
    "columns": ["review", "label", "base", "tuned", "base: likeliest"],
    "data": [
        ["很好吃", "积极", "积极", "积极", "积极"],
        ["[bold]不好[/bold]\n真的", "消极", "消\u0007极", "消\u0007极", "积极"],
        ["第三行" * 40, "消极", "x", "y", "积极"],
        ["第四行", "消极", "x", "y", "积极"],
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "evaluation.json").write_text(json.dumps(REPORT))
    (tmp_path / "predictions.json").write_text(json.dumps(TABLE))
    (tmp_path / "metrics.jsonl").write_text('{"event": "done", "time": 1, "segment": 0}\n')
    return tmp_path


def shown(report: dict, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    for each in tables(report):
        console.print(each)
    return console.file.getvalue()


def test_the_first_rows_and_those_that_differ_are_shown(folder: Path) -> None:
    text = shown(summarize_evaluation(folder))
    assert "the first 2 of 4 rows" in text
    assert "further rows on which the models differ; 2 are such" in text
    assert "[bold]不好[/bold] 真的" in text  # text, not markup, and on one line
    assert "\u0007" not in text
    assert "第三行" * 15 in text.replace("…", "")
    assert "第三行" * 30 not in text
    assert text.count("第四行") == text.count("很好吃") == 1
    alike = summarize_evaluation(folder) | {"shown": 1}
    alike["table"]["data"][2:] = [["同样", "消极", "x", "x", "积极"]]
    assert "further rows" not in shown(alike)
    alike["table"]["data"][2][3] = "y"
    assert "further rows on which the models differ; 1 are such" in shown(alike)
    alike["table"]["data"][2][3], alike["table"]["data"][0][3] = "x", "y"
    assert "further rows" not in shown(alike)  # the one row that differs was shown already


def test_every_figure_is_shown(folder: Path) -> None:
    text = shown(summarize_evaluation(folder))
    for part in (
        "0.8750 (0.8650–0.8850)",
        "12.5%",
        "loss of the answers",
        "7.5000",
        "8 rows: 5 积极, 3 消极",
        "always the most frequent: 0.6250",
        "the 95% bootstrap interval",
        "tuned against base, by free answer: +75.00 points (+50.00 to +90.00)",
        "right alone 6 against 0 rows",
        "McNemar's exact p 0.031",
    ):
        assert part in text
    tiny = copy.deepcopy(REPORT)
    tiny["comparisons"][0]["p"] = 1e-12
    assert "p below 0.0001" in shown(tiny | {"table": TABLE})


def test_the_summary_is_the_report_and_how_it_ended(folder: Path) -> None:
    summarize_evaluation(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["outcome"] == "done"
    assert summary["evaluation"] == REPORT


def test_plain_text_is_losses_alone(folder: Path) -> None:
    plain = {"dataset": "text", "kind": "text", "losses": {"one": {"loss": 2.0, "perplexity": 7.389}}}
    (folder / "evaluation.json").write_text(json.dumps(plain))
    text = shown(summarize_evaluation(folder))
    assert "perplexity" in text
    assert "7.3890" in text
    assert not (folder / "confusion.png").exists()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch):
    """What is drawn as names of classes, and in which font."""
    seen = []
    draw = confusion._draw

    def remember(axes, counts, names, columns, font):
        seen.append((names, columns, font))
        draw(axes, counts, names, columns, font)

    monkeypatch.setattr(confusion, "_draw", remember)
    return seen


def test_classes_go_by_their_labels_where_no_font_has_their_words(drawn, monkeypatch) -> None:
    monkeypatch.setattr(confusion, "find_font", lambda characters: None)
    picture = confusion.draw_confusions(REPORT)
    assert image.imread(io.BytesIO(picture)).shape[2] == 4
    assert drawn == [(["1", "0"], ["1", "0", "other"], None)] * 2


@pytest.mark.filterwarnings("ignore:Glyph")  # the font is a stand-in
def test_classes_go_by_their_words_where_a_font_has_them(drawn, monkeypatch) -> None:
    font = FontProperties()
    asked = []
    monkeypatch.setattr(confusion, "find_font", lambda characters: asked.append(characters) or font)
    confusion.draw_confusions(REPORT | {"generated": False})
    assert drawn == [(["积极", "消极"], ["积极", "消极"], font)] * 2
    assert set("积极消极") <= set(asked[0])


def test_a_font_is_one_that_has_the_characters() -> None:
    assert confusion.find_font("\U0010fffe") is None
    found = confusion.find_font("积极消极")
    if found is not None:
        from matplotlib.ft2font import FT2Font

        assert {ord(character) for character in "积极"} <= FT2Font(found.get_file()).get_charmap().keys()
