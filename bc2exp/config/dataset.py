"""The dataset group: which text, and how it becomes samples."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from bc2exp.config.fields import setting


class Source(Enum):
    """Where documents come from: files, or the text that ships with the package."""

    file = "file"
    embedded_corpus = "embedded_corpus"
    embedded_reviews = "embedded_reviews"


@dataclass
class DatasetConfig:
    """Plain text, one document a row or line."""

    name: str = setting("name of the data set, used in records")
    source: Source = setting("file, embedded_corpus or embedded_reviews")
    path: str | None = setting(
        "a .parquet, .csv, .jsonl or .txt file, a folder or a pattern of such files, or the .bin or .idx of "
        "a token store in Megatron's format (source=file)",
        None,
        path=True,
    )
    column: str | None = setting("column of a parquet or csv, key of a jsonl, that holds the text", None)
    sequence_length: int = setting("tokens a sample", minimum=2)
    append_eos: bool = setting("end every document with the end-of-text token", False)
    separate_documents: bool = setting(
        "neither attention nor a label crosses the end of a document inside a sample", False
    )
    split: list[int] = setting(
        "parts of the documents for training, evaluation and test",
        minimum=0,
        default_factory=lambda: [949, 50, 1],
    )
    max_bad_rows: int = setting("bad rows that are tolerated, if it is more than the fraction", 10, minimum=0)
    max_bad_fraction: float = setting(
        "part of all rows that may be bad, if it is more than the number", 0.001, minimum=0, maximum=1
    )
    max_row_bytes: int = setting("longer rows are bad", 16 * 2**20, minimum=1)
    cache: str = setting("folder of prepared token stores", "runs/prepared", path=True)
    workers: int | None = setting("processes that encode; null: one a processor core", None, minimum=1)
