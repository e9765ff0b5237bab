"""What benchmarks leave: ratios, tables that do not go stale, verdicts on later ones. Nothing is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import check  # noqa: E402
import record  # noqa: E402

NAMES = sorted(file.stem for file in record.RESULTS.glob("*.json"))


def entry(value: float, better: str, target: float | None = None) -> dict:
    return record.ratio(
        "a case", "a figure", [value, 9 * value, 2 * value], [2.0, 1.0, 8.0], better=better, target=target
    )


def test_a_ratio_is_of_medians_and_of_the_best():
    found = entry(3.0, "higher")
    assert (found["value"], found["best"]) == (6.0 / 2.0, 3.0 / 1.0)
    with pytest.raises(AssertionError):
        entry(3.0, "faster")


@pytest.mark.parametrize(
    ("better", "target", "expected"),
    [
        ("higher", 2.9, True),
        ("higher", 3.1, False),
        ("lower", 3.1, True),
        ("lower", 2.9, False),
        ("lower", None, None),
    ],
)
def test_a_target_is_reached_from_its_own_side(better, target, expected):
    assert record.meets(entry(3.0, better, target)) is expected


@pytest.mark.parametrize(
    ("better", "today", "expected"),
    [
        ("higher", 2.6, False),
        ("higher", 2.5, True),
        ("higher", 9.0, False),
        ("lower", 3.4, False),
        ("lower", 3.5, True),
        ("lower", 0.1, False),
    ],
)
def test_a_later_ratio_may_be_worse_by_its_margin(better, today, expected):
    committed = {"ratios": [entry(3.0, better), {**entry(3.0, better), "case": "nobody ran it"}]}
    now = {"ratios": [{**entry(3.0, better), "value": today}]}
    found, missing = check.verdicts(committed, now)
    assert (found.committed, found.today, found.is_worse) == (3.0, today, expected)
    assert str(found).endswith("WORSE" if expected else "ok")
    assert not missing.is_worse
    assert str(missing) == "nobody ran it: a figure: committed 3, not measured today"


@pytest.mark.parametrize("failing", [False, True])
def test_a_benchmark_runs_with_the_words_of_its_record_and_a_failure_is_said(
    failing, tmp_path, monkeypatch, capsys
):
    made = {"date": "", "command": "python benchmarks/one.py --steps 5 --rounds 3"}
    then = {"ratios": [entry(3.0, "higher")], "samples": [], "machine": {"processor": "A"}, **made}
    (tmp_path / "one.json").write_text(json.dumps(then))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "one.py").write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "assert sys.argv[1:-1] == ['--steps', '5', '--rounds', '3', '--rounds', '1', '--results']\n"
        f"if {failing}: sys.exit(3)\n"
        f"found = json.loads(Path({str(tmp_path / 'one.json')!r}).read_text())\n"
        "found['machine']['processor'] = 'B'\n"
        "(Path(sys.argv[-1]) / 'one.json').write_text(json.dumps(found))\n"
    )
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["check.py"])
    assert check.main() == int(failing)
    printed = capsys.readouterr().out.splitlines()
    if failing:
        assert printed[0].startswith("one  FAILED with code 3: ")
    else:
        ok = "one  a case: a figure: committed 3, today 3, allowed 2.55  ok"
        assert printed == ["one  made on A, today's on B", ok]


@pytest.mark.skipif(not NAMES, reason="no record is committed")
def test_the_tables_are_those_of_the_records():
    text = record.README.read_text()
    assert record.render(text) == text
    assert record.render(record.render(text)) == text


@pytest.mark.parametrize("name", NAMES)
def test_a_record_names_no_place_and_follows_from_its_samples(name):
    found = record.read(name)
    text = json.dumps(found)
    assert not any(word in text for word in ("/home", "/tmp", "/root", "/work", "\\\\"))
    assert (record.RESULTS / f"{name}.png").is_file()
    assert found["samples"]
    assert all(sample["values"] for sample in found["samples"])


def test_points_make_a_second_table(tmp_path):
    points = [["axis", "point"], ["rows", "10"], ["rows", "30"]]
    record.write("new", {"command": "c", "samples": [], "ratios": [], "points": points}, tmp_path)
    found = record.table(record.read("new", tmp_path))
    assert "\n\n| axis | point |\n|---|---|\n| rows | 10 |\n| rows | 30 |\n\n" in found


def test_the_command_of_a_record_names_no_place():
    words = ["--rounds", "2", "--results", "/a", "--side", "norm head", "--peer=/b", "--tokenizer", "/c"]
    assert record.command("new", words) == "python benchmarks/new.py --rounds 2 --side 'norm head'"


def test_a_table_that_has_no_place_is_said(tmp_path):
    record.write("new", {"command": "c", "samples": [], "ratios": [entry(1.0, "lower")]}, tmp_path)
    with pytest.raises(SystemExit, match="no place for new"):
        record.render("nothing", tmp_path)
    found = record.render("<!-- table new -->\nold\n<!-- end -->\nrest", tmp_path)
    assert "| a case | a figure | 1.00 | 1.00 |  |  |" in found
    assert "old" not in found
    assert found.endswith("<!-- end -->\nrest")
