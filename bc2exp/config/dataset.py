"""The dataset group: which text, and how it becomes samples.

One schema serves plain text (pretraining) and rows of questions and answers (fine-tuning), so that the same
file can be both; `supervised.py` checks what a kind needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from bc2exp.config.fields import setting


class Source(Enum):
    """Where documents come from: files, or the text that ships with the package."""

    file = "file"
    embedded_corpus = "embedded_corpus"
    embedded_reviews = "embedded_reviews"


class Kind(Enum):
    """What a row holds: text; a question and its answer; a text and its label; the turns of a talk."""

    text = "text"
    instruction = "instruction"
    classification = "classification"
    conversation = "conversation"


class ChatFormat(Enum):
    """Which tokens a model learns of a row: `bc2exp/text/chat.py`."""

    modelzoo = "modelzoo"
    official = "official"


class OverLong(Enum):
    """What becomes of a row with more tokens than sequence_length."""

    drop = "drop"
    truncate = "truncate"


class Packing(Enum):
    """How the rows of a step become sequences. The loss is the same in all of them."""

    packed = "packed"
    bucketed = "bucketed"
    longest = "longest"
    fixed = "fixed"


@dataclass
class DatasetConfig:
    """Plain text, one document a row or line, or rows of questions and answers."""

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

    # What follows is read by task=finetune, task=evaluate and task=generate.
    kind: Kind = setting(
        "text: nothing but text; classification, instruction, conversation: what a model is tuned on",
        Kind.text,
    )
    format: ChatFormat = setting(
        "modelzoo: one question, of which the answer is learned; official: Baichuan2's own, for many turns",
        ChatFormat.modelzoo,
    )
    prompt: str | None = setting("the question, with columns of the table in braces: '{review} -> '", None)
    text_column: str | None = setting("classification: column that is judged, as tables show it", None)
    label_column: str | None = setting("classification: column of the label", None)
    label_words: dict[str, str] = setting(
        "classification: the word that is learned for each label ('1': 积极)", default_factory=dict
    )
    answer_column: str | None = setting("instruction: column of the answer", None)
    input_column: str | None = setting("instruction: column that may be empty in some rows", None)
    prompt_without_input: str | None = setting("instruction: the question of rows where it is empty", None)
    turns_column: str | None = setting("conversation: key of the list of turns", None)
    role_key: str = setting("conversation: key of a turn that says who speaks", "from")
    content_key: str = setting("conversation: key of a turn that holds what is said", "value")
    roles: dict[str, str] = setting(
        "conversation: user, assistant or system for each word under role_key", default_factory=dict
    )
    system_column: str | None = setting("conversation: key of what the system says first", None)
    num_train: int | None = setting("rows to train on; null: by split", None, minimum=1)
    num_eval: int | None = setting("rows to evaluate on; null: the rest, or by split", None, minimum=1)
    stratified: bool = setting("classification: each part has as much of each label as the whole", False)
    split_seed: int = setting(
        "seeds the shuffle before the split, which does not depend on `seed`",
        42,
        minimum=0,
        maximum=2**63 - 1,
    )
    over_long: OverLong = setting(
        "drop or truncate rows with more tokens than sequence_length; they are counted", OverLong.drop
    )
    packing: Packing = setting(
        "packed: rows share sequences of a few lengths, apart from each other; bucketed: a row each, padded "
        "to one of a few lengths; longest: to the longest of a forward pass; fixed: to sequence_length",
        Packing.packed,
    )
