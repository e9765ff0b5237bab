"""Published tables: their rows, the identities of each, and the row that contradicts itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from bc2exp.config.roots import data_root
from bc2exp.report.compare.columns import Columns, Figure
from bc2exp.report.compare.side import About
from bc2exp.report.compare.sources import read_path
from tests.report.compare.logs import read

TABLE = data_root() / "experiments" / "modellink_pretrain" / "published.csv"

# facts/recipes.md: samples/s, tokens/s/p, s/step
PUBLISHED = {
    "npu-7b-2024-01-26": (4.59, 2349, 6.973),
    "reference-7b-2024-01-26": (5.40, 2769, 5.915),
    "npu-7b-2024-02-19": (5.07, 2598, 6.305),
    "reference-7b-2024-02-19": (None, 3969, None),
    "npu-7b-2024-03": (5.2, 2664, 12.3),
    "reference-7b-2024-03": (None, 3969, None),
    "npu-13b-2024-03-17": (1.83, 1346, 4.35),
    "reference-13b-2024-03-17": (None, 872, None),
    "npu-13b-2024-09-12": (None, 1754, None),
    "reference-13b-2024-09-12": (None, 2062, None),
}


def chosen(name: str):  # type: ignore[no-untyped-def]
    return read_path(TABLE, "task.a=published.csv", About(row=name))


def test_the_figures_are_the_published_ones() -> None:
    side = chosen("npu-7b-2024-01-26")
    assert side.columns.global_batch == 32
    assert side.name == "published.csv, npu-7b-2024-01-26"
    for name, columns in side.rows:
        figures = (columns.samples_per_s, columns.tokens_per_s_per_device, columns.s_per_step)
        assert tuple(figure and figure.value for figure in figures) == PUBLISHED[name]
        assert (columns.num_devices, columns.sequence_length) == (8, 4096)
    assert len(side.rows) == len(PUBLISHED)


def test_one_row_of_the_published_table_contradicts_itself() -> None:
    rows = chosen("npu-7b-2024-03").rows
    broken = [(name, check) for name, row in rows for check in row.identities() if not check["holds"]]
    ((name, check),) = broken
    assert name == "npu-13b-2024-03-17"
    assert check["found"] == 1346
    assert check["expected"] == pytest.approx(936.96)
    checked = [name for name, row in rows if any(True for _ in row.identities())]
    assert len(checked) == 5


def test_rounding_breaks_no_identity_and_more_than_rounding_does() -> None:
    counts = {"global_batch": 64, "sequence_length": 4096, "num_devices": 8}
    for samples, seconds, holds in [("5.2", "12.3", True), ("5.2", "12.4", True), ("5.20", "12.40", False)]:
        row = Columns(samples_per_s=Figure.printed(samples), s_per_step=Figure.printed(seconds), **counts)
        assert [check["holds"] for check in row.identities()] == [holds], (samples, seconds)


@pytest.mark.parametrize(("text", "half"), [("4.59", 0.005), ("2349", 0.5), ("1.2e-3", 5e-5), ("5.", 0.5)])
def test_what_rounding_may_hide(text: str, half: float) -> None:
    assert Figure.printed(text).half_unit == pytest.approx(half)


def test_what_follows_from_the_rest_of_a_row_is_derived() -> None:
    side = chosen("npu-13b-2024-09-12")
    assert side.columns.samples_per_s.value == pytest.approx(1754 * 8 / 4096)
    assert side.columns.samples_per_s.derived
    assert side.columns.s_per_step is None, "its global batch was not published"
    assert side.columns.plain()["derived"] == ["samples_per_s"]


def test_yaml_rows_and_the_only_row(tmp_path: Path) -> None:
    text = "- {row: mine, devices: 8, sequence: 4096, samples/s: 4.59, tokens/s/p: '2,349', s/step: –}\n"
    side = read(tmp_path, text, "t.yaml", global_batch=32)
    assert side.columns.tokens_per_s_per_device.value == 2349
    assert side.columns.global_batch == 32
    assert side.columns.s_per_step.derived
    assert read(tmp_path, "rows:\n" + text, "t.yml").columns.num_devices == 8


WRONG = [
    ("row,samples/s\na,1\nb,2\n", {}, "task.a=t.csv: has 2 rows; choose one: task.about_a.row=... of a, b"),
    ("row,samples/s\na,1\n", {"row": "c"}, "task.about_a.row=c: no such row; there are a"),
    ("row,samples/s\na,fast\n", {}, "row a, column samples/s: fast is no number above 0"),
    ("row,samples/s\na,-1\n", {}, "row a, column samples/s: -1 is no number above 0"),
    ("row,samples/s,devices\na,1,8.5\n", {}, "row a, column devices: 8.5 is no number above 0"),
    ("row,model\na,7B\n", {}, "row a: has none of samples/s, tokens/s/p, s/step"),
    ("row,samples/s\na,1\na,2\n", {}, "two rows are called a"),
    ("samples/s\n1\n", {}, "row 1 has no name"),
    ("row,samples/s\na,1,2\n", {}, "row 1 has more cells than the heading"),
    ("row,samples/s\n", {}, "it has no rows"),
    ("row,samples/s,devices\na,1,8\n", {"num_devices": 4}, "task.about_a.num_devices=4: the row says 8"),
]


@pytest.mark.parametrize(("text", "about", "told"), WRONG)
def test_a_wrong_table_is_refused(text: str, about: dict[str, object], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text, "t.csv", **about)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "3", "- 3", "rows: {a: 1}", "nothing: here"])
def test_another_yaml_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.a=t\.yaml: is no table of published figures"):
        read(tmp_path, text, "t.yaml")
