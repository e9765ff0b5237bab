"""Models side by side on the evaluation part of a data set."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bc2exp.config.dataset import DatasetConfig, Kind
from bc2exp.config.errors import UserError
from bc2exp.config.evaluate import EvaluateConfig
from bc2exp.config.model_folders import named_models
from bc2exp.config.root import Config
from bc2exp.data import packing
from bc2exp.data.batches import MicroBatch, evaluation_batches
from bc2exp.data.examples import encode_samples
from bc2exp.data.supervised import Sample
from bc2exp.data.tokens import require_samples
from bc2exp.evaluation.judgement import Choices, Method, Row, judge, table
from bc2exp.evaluation.scores import word_log_likelihoods, words_with_ends
from bc2exp.generation.decoding import decode
from bc2exp.generation.sampling import GREEDY
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.world import World
from bc2exp.storage import atomic
from bc2exp.tasks.models import Answerer, make_copies_mesh, open_model
from bc2exp.tasks.out_of_memory import telling_what_takes_less
from bc2exp.tasks.prepare import open_store
from bc2exp.tasks.supervised import read_splits
from bc2exp.text.chat import encode_text, generation_prompt
from bc2exp.tracking.journal import Journal, NullJournal
from bc2exp.train.trainer import evaluate as mean_loss

_SECONDS_BETWEEN_RECORDS = 0.5
REPORT, TABLE, CSV = "evaluation.json", "predictions.json", "predictions.csv"


@telling_what_takes_less
def evaluate(config: Config, folder: Path, world: World, journal: Journal | NullJournal) -> str:
    """Judge the models of the configuration; leaves `evaluation.json` in `folder`, and for labelled data all
    rows in `predictions.csv` and `predictions.json`."""
    task, data = config.task, config.dataset
    assert isinstance(task, EvaluateConfig)
    mesh = make_copies_mesh(config, world)
    stop_file = folder / "stop"
    samples = None if data.kind is Kind.text else read_samples(data, task, world, journal)
    words = list(data.label_words.values()) if data.kind is Kind.classification else []
    named, choices, losses = named_models(task.models, config.model.name), {}, {}
    for name, source in named.items():
        if any(world.gather(stop_file.exists())):
            return "stopped"
        journal.event("note", text=f"{name}: {source or config.model.weights or 'an untrained model'}")
        began = time.monotonic()
        key = "task.models" if isinstance(task.models, str) else f"task.models.{name}"
        answerer = open_model(config, source, key, mesh, task.init_std, journal)
        if samples is None:
            losses[name] = text_loss(config, task, answerer, mesh, journal)
        else:
            losses[name] = answer_loss(data, task, answerer, mesh, samples, journal)
        if samples is not None and words:
            told = Told(journal, name)
            found = choose(config, task, answerer, mesh, samples, words, stop_file, told)
            if found is None:
                return "stopped"
            choices[name] = found
        seconds = time.monotonic() - began
        metrics = losses[name] | {"seconds": seconds}
        journal.metrics(0, {f"eval/{name}/{figure}": value for figure, value in metrics.items()})
        del answerer  # before the next model is loaded
    report: dict[str, Any] = {"dataset": data.name, "kind": data.kind.value, "losses": losses}
    if samples is not None and words:
        rows = [
            Row(sample.text, words.index(sample.word or ""), sample.file, sample.number) for sample in samples
        ]
        method = Method(task.resamples, task.confidence, config.seed)
        report |= judge(rows, choices, words, method)
        report |= {"labels": list(data.label_words), "shown": task.shown, "generated": task.generate}
        if world.rank == 0:
            write_table(folder, *table(rows, choices, words, data.text_column or "text"))
        for name, figures in report["models"].items():
            journal.metrics(
                0, {f"eval/{name}/{key}": value for key, value in flat(figures, report["labels"]).items()}
            )
        for pair in report["comparisons"]:
            about = f"eval/{pair['other']} against {pair['one']}/{pair['by']}"
            journal.metrics(
                0, {f"{about}/difference": pair["difference"]["value"], f"{about}/mcnemar_p": pair["p"]}
            )
    if world.rank == 0:
        atomic.write_json(folder / REPORT, report)
    return "done"


def read_samples(
    data: DatasetConfig, task: EvaluateConfig, world: World, journal: Journal | NullJournal
) -> list[Sample]:
    """The rows of the evaluation part, recorded in the journal.

    Raises UserError where not every rank finds the same.
    """
    splits = read_splits(data)
    digest = splits.digest()
    if len(set(world.gather(digest))) > 1:
        raise UserError(f"dataset.path={data.path}: not every rank finds the same rows there")
    chosen, bad = splits.evaluation[: task.samples], splits.reading.bad
    journal.event(
        "data",
        name=data.name,
        path=data.path or data.source.value,
        digest=digest[:36],
        split="evaluation",
        rows=splits.reading.num_rows,
        evaluated=len(chosen),
        bad_rows=bad.total(),
    )
    if bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad.most_common())
        journal.event("note", text=f"bad rows were left out: {bad.total()} ({reasons})")
    return chosen


def choose(
    config: Config,
    task: EvaluateConfig,
    answerer: Answerer,
    mesh: Mesh,
    samples: Sequence[Sample],
    words: Sequence[str],
    stop_file: Path,
    told: Told,
) -> Choices | None:
    """What a model chooses on every row: each copy works on its share, and every rank gets it all. None where
    a person asked to stop."""
    tokenizer, layout = answerer.tokenizer, answerer.layout
    limit = config.model.max_positions - task.max_new_tokens
    prompts = [generation_prompt(tokenizer, sample.turns[:-1]) for sample in samples]
    require_room(samples, prompts, limit, config.model.max_positions)
    word_ids = words_with_ends([encode_text(tokenizer, word) for word in words], tokenizer.eos_id)
    # Prompts of one length need no padding; every copy gets as many short and long ones as the others.
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    mine = order[mesh.data_rank :: mesh.num_data_ranks]
    asked = [prompts[index] for index in mine]
    scores = word_log_likelihoods(
        layout.logits,
        asked,
        word_ids,
        batch_tokens=task.batch_tokens,
        told=lambda done: told("likelihoods", done, len(asked)),
    )
    answers: list[str | None] = []
    stopped = False
    for start in range(0, len(asked) if task.generate else 0, task.batch):
        part = asked[start : start + task.batch]
        decoded = decode(
            layout.logits,
            part,
            sampling=GREEDY,
            seeds=[0] * len(part),
            max_new_tokens=[task.max_new_tokens] * len(part),
            eos_id=tokenizer.eos_id,
            num_words=tokenizer.vocab_size,
            stop=lambda: layout.any(stop_file.exists()),
        )
        if stopped := any(answer.ended == "stopped" for answer in decoded):
            break
        answers += [tokenizer.decode(answer.tokens) for answer in decoded]
        told("answers", len(answers), len(asked))
    if any(mesh.world.gather(stopped)):
        return None
    found: dict[int, tuple[list[float], str | None]] = {}
    free = answers if task.generate else [None] * len(mine)
    for share in mesh.world.gather(list(zip(mine, scores, free, strict=True))):
        found |= {index: (score, answer) for index, score, answer in share}
    in_order = [found[index] for index in range(len(samples))]
    said = [answer for _, answer in in_order if answer is not None]
    return Choices([score for score, _ in in_order], said if task.generate else None)


class Told:
    """Tells the journal how far a model is, a few times a second at most."""

    def __init__(self, journal: Journal | NullJournal, name: str) -> None:
        self._journal, self._name = journal, name
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._last >= _SECONDS_BETWEEN_RECORDS:
            self._last = time.monotonic()
            self._journal.event("progress", label=f"{self._name}: {what}", done=done, total=total)


def require_room(
    samples: Sequence[Sample], prompts: Sequence[list[int]], limit: int, max_positions: int
) -> None:
    """Raise UserError where a prompt leaves no room for an answer: figures are of all rows or of none."""
    long = [index for index, prompt in enumerate(prompts) if len(prompt) > limit]
    if long:
        first = samples[long[0]]
        raise UserError(
            f"dataset.path: {len(long)} of {len(samples)} rows to evaluate on have prompts too long for "
            f"model.max_positions={max_positions}, the first is {first.file} row {first.number} with "
            f"{len(prompts[long[0]])} tokens, and {limit} leave room for an answer; take them out, or make "
            "task.max_new_tokens smaller"
        )


def answer_loss(
    data: DatasetConfig,
    task: EvaluateConfig,
    answerer: Answerer,
    mesh: Mesh,
    samples: Sequence[Sample],
    journal: Journal | NullJournal,
) -> dict[str, float]:
    """The loss as training measures it, over the answers of all rows that training would take."""
    encoded = encode_samples(
        samples,
        answerer.tokenizer,
        chat_format=data.format.value,
        sequence_length=data.sequence_length,
        over_long=data.over_long.value,
    )
    if len(encoded.examples) < len(samples):
        journal.event(
            "note",
            text=f"{len(samples) - len(encoded.examples)} of {len(samples)} rows are longer than "
            f"dataset.sequence_length={data.sequence_length} tokens: they are not in the loss of the answers",
        )
    if not len(encoded.examples):
        return {}
    packer = packing.Packer(
        encoded.examples,
        "packed",
        data.sequence_length,
        max(1, task.batch_tokens // data.sequence_length),
        mesh.num_data_ranks,
    )
    batches = packing.evaluation_batches(
        packer, global_batch=task.batch * mesh.num_data_ranks, rank=mesh.data_rank, num_samples=None
    )
    return _loss(answerer, batches)


def text_loss(
    config: Config, task: EvaluateConfig, answerer: Answerer, mesh: Mesh, journal: Journal | NullJournal
) -> dict[str, float]:
    """Loss and perplexity on the held-out part of plain text."""
    data, tokenizer, layout = config.dataset, answerer.tokenizer, answerer.layout
    store, _ = open_store(data, tokenizer, journal)
    store.check_vocabulary(layout.model.shape["vocab_size"])
    held_out = store.streams(data.split)[1]
    require_samples(held_out, data.sequence_length, f"the held-out part of {data.name}")
    batches = evaluation_batches(
        held_out,
        sequence_length=data.sequence_length,
        micro_batch=max(1, task.batch_tokens // data.sequence_length),
        rank=mesh.data_rank,
        num_ranks=mesh.num_data_ranks,
        num_samples=task.samples,
        separate_documents=data.separate_documents,
    )
    return _loss(answerer, batches)


def _loss(answerer: Answerer, batches: list[MicroBatch]) -> dict[str, float]:
    loss = mean_loss(answerer.layout, batches)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def flat(figures: dict[str, Any], labels: Sequence[str]) -> dict[str, float]:
    """The numbers of a model under the names of metrics; those of free answers begin with `answers/`, and
    `f1/1` is the F1 of the class with the label 1."""
    found: dict[str, float] = {}
    for by, values in figures.items():
        prefix = "" if by == "likelihood" else "answers/"
        for key in ("accuracy", "macro_f1"):
            estimate = values[key]
            found |= {
                f"{prefix}{key}": estimate["value"],
                f"{prefix}{key}_low": estimate["low"],
                f"{prefix}{key}_high": estimate["high"],
            }
        found |= {f"{prefix}f1/{label}": value for label, value in zip(labels, values["f1"], strict=True)}
        if by == "answers":
            found["answers/free_form"] = values["free_form"]
    return found


def write_table(folder: Path, columns: list[str], lines: list[list[Any]]) -> None:
    """All rows, as CSV and as MLflow shows tables."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *lines])
    atomic.write_text(folder / CSV, text.getvalue())
    atomic.write_json(folder / TABLE, {"columns": columns, "data": lines})
