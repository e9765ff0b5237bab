"""From a configured data set to the samples that are trained on and those that are held out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bc2exp.config.dataset import DatasetConfig
from bc2exp.config.dataset import Kind as KindName
from bc2exp.data.quarantine import Limits
from bc2exp.data.sources import find_source
from bc2exp.data.splits import split_samples
from bc2exp.data.supervised import (
    Classification,
    Conversation,
    Instruction,
    Kind,
    Reading,
    Sample,
    read_samples,
)
from bc2exp.hardware.phase import DATA, phase
from bc2exp.storage import atomic


@dataclass(frozen=True)
class Splits:
    """The samples of a data set, in the order of the shuffle.

    Attributes:
        train, evaluation: disjoint.
        reading: what the files hold, bad rows included.
    """

    train: list[Sample]
    evaluation: list[Sample]
    reading: Reading

    def digest(self) -> str:
        """sha256 over both parts, hexadecimal: the same split of the same rows has the same."""
        result = hashlib.sha256()
        for part in (self.train, self.evaluation):
            for sample in part:
                result.update(json.dumps([*sample.turns, sample.label], ensure_ascii=False).encode() + b"\n")
            result.update(b"\n")
        return result.hexdigest()


@phase(DATA)
def read_splits(data: DatasetConfig) -> Splits:
    """Read a data set of questions and answers and split it; the same anywhere.

    Raises UserError for files, columns, rows or numbers that will not do.
    """
    kind = make_kind(data)
    column = next(iter(kind.columns()))
    source = find_source(data.source.value, data.path, column, data.max_row_bytes)
    reading = read_samples(source, kind, Limits(data.max_bad_rows, data.max_bad_fraction))
    split = split_samples(
        [sample.label for sample in reading.samples],
        seed=data.split_seed,
        num_train=data.num_train,
        num_eval=data.num_eval,
        weights=data.split,
        stratified=data.stratified,
    )
    train, evaluation = ([reading.samples[index] for index in part] for part in split)
    return Splits(train, evaluation, reading)


def make_kind(data: DatasetConfig) -> Kind:
    """What the rows of the configured data set hold."""
    limit = data.max_row_bytes
    if data.kind is KindName.classification:
        assert data.text_column is not None
        assert data.label_column is not None
        assert data.prompt is not None
        return Classification(data.text_column, data.label_column, data.label_words, data.prompt, limit)
    if data.kind is KindName.instruction:
        assert data.prompt is not None
        assert data.answer_column is not None
        return Instruction(
            data.prompt, data.answer_column, data.input_column, data.prompt_without_input, limit
        )
    assert data.kind is KindName.conversation, data.kind
    assert data.turns_column is not None
    return Conversation(
        data.turns_column, data.role_key, data.content_key, data.roles, data.system_column, limit
    )


def write_splits(splits: Splits, data: DatasetConfig, folder: Path) -> None:
    """Leave train.jsonl and eval.jsonl in `folder` (a classification as the recipe writes it, {"review": …,
    "label": "积极"}; else the turns), bad_rows.jsonl, and what is known of the whole in report.json."""
    for name, part in (("train", splits.train), ("eval", splits.evaluation)):
        atomic.write_text(folder / f"{name}.jsonl", "".join(_line(_as_data(each, data)) for each in part))
    bad = [
        {"file": row.file, "row": row.number, "reason": row.reason, "excerpt": row.excerpt}
        for row in splits.reading.listed
    ]
    atomic.write_text(folder / "bad_rows.jsonl", "".join(map(_line, bad)))
    atomic.write_json(folder / "report.json", report(splits, data))


def report(splits: Splits, data: DatasetConfig) -> dict[str, Any]:
    """What is known of a data set, as JSON holds it."""
    reading = splits.reading
    trained = {sample.text for sample in splits.train}
    return {
        "name": data.name,
        "rows": reading.num_rows,
        "empty": reading.empty,
        "bad": dict(reading.bad),
        "split_seed": data.split_seed,
        "stratified": data.stratified,
        "digest": splits.digest(),
        "labels": _labels(reading.samples),
        "train": {"rows": len(splits.train), "labels": _labels(splits.train)},
        "evaluation": {"rows": len(splits.evaluation), "labels": _labels(splits.evaluation)},
        "with_several_labels": reading.conflicts,
        "evaluation_texts_also_trained_on": sum(sample.text in trained for sample in splits.evaluation),
    }


def _labels(samples: list[Sample]) -> dict[str, int]:
    counts = Counter(sample.label for sample in samples if sample.label is not None)
    return dict(sorted(counts.items()))


def _as_data(sample: Sample, data: DatasetConfig) -> dict[str, Any]:
    if sample.label is not None:
        assert data.text_column is not None
        return {data.text_column: sample.text, "label": sample.word}
    return {"turns": [turn._asdict() for turn in sample.turns]}


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
