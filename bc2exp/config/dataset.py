"""The dataset group: which text, and how it becomes samples."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from bc2exp.config.fields import setting


class Source(Enum):
    """Where documents come from: a file, or the text that ships with the package."""

    file = "file"
    embedded_corpus = "embedded_corpus"
    embedded_reviews = "embedded_reviews"


@dataclass
class DatasetConfig:
    """Plain text, one document a row or line."""

    name: str = setting("name of the data set, used in records")
    source: Source = setting("file, embedded_corpus or embedded_reviews")
    path: str | None = setting("a .parquet, .csv or .txt file (source=file)", None, path=True)
    column: str | None = setting("column of a parquet or csv that holds the text", None)
    sequence_length: int = setting("tokens a sample", minimum=2)
    append_eos: bool = setting("end every document with the end-of-text token", False)
    split: list[int] = setting(
        "parts of the documents for training, evaluation and test",
        minimum=0,
        default_factory=lambda: [949, 50, 1],
    )
