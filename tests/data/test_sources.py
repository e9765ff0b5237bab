from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from bc2exp.config.errors import UserError
from bc2exp.data.sources import documents
from tests.shared_data import shared_data

TEXTS = ["送餐很快", 'said "hot", was cold', "two\nlines", "  spaces  ", "1234"]


def _read(path: Path, column: str | None = None) -> list[str]:
    return list(documents("file", str(path), column))


def test_a_parquet_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"n": range(5), "text": TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert _read(path, "text") == TEXTS


def test_a_csv_column_with_quotes_newlines_and_digits(tmp_path: Path) -> None:
    import csv

    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["label", "review"], *[[1, text] for text in reversed(TEXTS)]])
    assert _read(path, "review") == TEXTS[::-1]


def test_the_lines_of_a_txt(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff一\r\n\n two \nthree".encode())
    assert _read(path) == ["一", " two ", "three"]


def test_empty_and_missing_texts_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["a", None, "", "b"]}), path)
    assert _read(path, "text") == ["a", "b"]


def test_wrong_columns_are_named_with_those_there_are(tmp_path: Path) -> None:
    parquet, csv = tmp_path / "a.parquet", tmp_path / "a.csv"
    pyarrow.parquet.write_table(pa.table({"n": [1], "text": ["a"]}), parquet)
    csv.write_text("n,text\n1,a\n")
    for path in (parquet, csv):
        with pytest.raises(UserError, match=r"dataset\.column=txt.*n, text"):
            _read(path, "txt")
    with pytest.raises(UserError, match=r"holds int64.*text is in text"):
        _read(parquet, "n")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".txt"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"text\n\xff\xfe\xfa\n")
    with pytest.raises(UserError, match=f"dataset.path={path}") as error:
        _read(path, "text")
    assert "\n" not in str(error.value)


def test_the_embedded_texts_alternate_languages() -> None:
    corpus = list(documents("embedded_corpus", None, None))
    assert any("\u4e00" <= char <= "\u9fff" for char in corpus[0])
    assert corpus[1].isascii()
    assert len(list(documents("embedded_reviews", None, None))) > 300


def test_real_alpaca_and_waimai() -> None:
    alpaca = _read(shared_data("train-00000-of-00001-a09b74b3ef9c3b56.parquet"), "text")
    assert len(alpaca) == 52_002
    waimai = _read(shared_data("waimai_10k.csv"), "review")
    assert len(waimai) == 11_987
