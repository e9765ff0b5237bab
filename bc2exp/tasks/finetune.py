"""Supervised fine-tuning of all weights, on rows of questions and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bc2exp.config.dataset import DatasetConfig
from bc2exp.config.errors import UserError
from bc2exp.config.finetune import FinetuneConfig
from bc2exp.config.root import Config
from bc2exp.data.batches import MicroBatch
from bc2exp.data.examples import Encoded, Examples, encode_samples
from bc2exp.data.packing import Packer, evaluation_batches, training_batches
from bc2exp.parallel.world import World
from bc2exp.tasks import build
from bc2exp.tasks.out_of_memory import telling_what_fits
from bc2exp.tasks.supervised import Splits, read_splits, report, write_splits
from bc2exp.text.tokenizer import Tokenizer, find_tokenizer
from bc2exp.tracking.journal import Journal, NullJournal
from bc2exp.train.trainer import Trainer


@telling_what_fits
def finetune(config: Config, folder: Path, world: World, journal: Journal | NullJournal) -> str:
    """Tune a model; leaves the rows (`data/`), checkpoints, the journal and the weights in `folder`."""
    tokenizer = Tokenizer(find_tokenizer(config.model.tokenizer, config.model.weights))
    trainer, start = make_trainer(config, folder, world, journal, tokenizer)
    outcome = trainer.run(start)
    if outcome == "done":
        layout, best = trainer.layout, trainer.best
        if best is not None and best.step != trainer.steps:
            trainer.checkpoints.load_step(layout, trainer.optimizer, best.step)
            journal.event(
                "note", text=f"the weights are those of step {best.step}, evaluation loss {best.value:.4f}"
            )
        vocab_size = layout.model.shape["vocab_size"]
        build.export(layout, config.model, vocab_size, tokenizer, folder / "weights")
    return outcome


def make_trainer(
    config: Config, folder: Path, world: World, journal: Journal | NullJournal, tokenizer: Tokenizer
) -> tuple[Trainer, int]:
    """The trainer of the configured run, and the step after which it goes on."""
    task, data = config.task, config.dataset
    assert isinstance(task, FinetuneConfig)
    vocab_size = build.find_vocabulary(config.model, tokenizer, journal)
    train, held_out = read_examples(data, tokenizer, folder, world, journal)
    steps = build.total_steps(task, len(train))
    if task.best_metric and not len(held_out):
        raise UserError(f"task.best_metric={task.best_metric}: {data.name} has no row to evaluate on")
    mesh = build.make_mesh(config, vocab_size, world)
    model = build.make_model(config.model, vocab_size, build.make_ops(config.hardware, world))
    tokens = train.starts[-1]
    throughput = build.make_throughput(
        model,
        config,
        vocab_size,
        task.global_batch,
        mean_length=tokens / len(train),
        labelled=train.num_labels / tokens,
    )

    def batches(micro_batch: int) -> tuple[Callable[[int], list[MicroBatch]], list[MicroBatch]]:
        def packer(examples: Examples) -> Packer:
            return Packer(
                examples,
                way=data.packing.value,
                sequence_length=data.sequence_length,
                micro_batch=micro_batch,
                num_ranks=mesh.num_data_ranks,
                stages=mesh.pipeline,
                multiple_of=mesh.tensor if config.parallelism.sequence_parallel else 1,
            )

        common = {"global_batch": task.global_batch, "rank": mesh.data_rank}
        return (
            training_batches(packer(train), seed=config.seed, **common),
            evaluation_batches(packer(held_out), num_samples=task.eval_samples, **common),
        )

    return build.make_trainer(
        config,
        folder,
        mesh,
        journal,
        model=model,
        throughput=throughput,
        steps=steps,
        batches=batches,
        origin={
            "the digest of the data": train.digest()[:12],
            "the digest of the tokenizer": tokenizer.digest[:12],
            "dataset.packing": data.packing.value,
        },
        keeps_best=task.best_metric is not None,
    )


def read_examples(
    data: DatasetConfig, tokenizer: Tokenizer, folder: Path, world: World, journal: Journal | NullJournal
) -> tuple[Examples, Examples]:
    """The rows to train on and the held-out ones, encoded; recorded in the journal and in `folder`/data.

    Every rank reads them, and must call it. Raises UserError for data that will not do.
    """
    splits = read_splits(data)
    if len(set(world.gather(splits.digest()))) > 1:
        raise UserError(f"dataset.path={data.path}: not every rank finds the same rows there")
    train, held_out = (
        encode_samples(
            part,
            tokenizer,
            chat_format=data.format.value,
            sequence_length=data.sequence_length,
            over_long=data.over_long.value,
        )
        for part in (splits.train, splits.evaluation)
    )
    if world.rank == 0:
        (folder / "data").mkdir(exist_ok=True)
        write_splits(splits, data, folder / "data")
    journal.event("data", **described(data, tokenizer, splits, train, held_out))
    for text in notes(data, splits, train, held_out):
        journal.event("note", text=text)
    if not len(train.examples):
        raise UserError(
            f"dataset.sequence_length={data.sequence_length}: none of {len(splits.train)} rows to train on "
            f"fits; the longest has {train.longest} tokens, and a row is its question, its answer and 3 more"
        )
    return train.examples, held_out.examples


def described(
    data: DatasetConfig, tokenizer: Tokenizer, splits: Splits, train: Encoded, held_out: Encoded
) -> dict[str, Any]:
    """What the journal says of the data set."""
    known = report(splits, data)
    longer = {
        f"{part}_{what}": getattr(encoded, what)
        for part, encoded in (("train", train), ("held_out", held_out))
        for what in ("dropped", "truncated", "no_answer", "longest", "marks")
    }
    return {
        "name": data.name,
        "path": data.path or data.source.value,
        "digest": known.pop("digest")[:36],
        "rows": known["rows"],
        "tokens": train.examples.starts[-1] + held_out.examples.starts[-1],
        "train_samples": len(train.examples),
        "train_tokens": train.examples.starts[-1],
        "train_labels": train.examples.num_labels,
        "held_out_samples": len(held_out.examples),
        **longer,
        "split_seed": data.split_seed,
        "labels": known["labels"],
        "bad_rows": sum(known["bad"].values()),
        "empty_rows": known["empty"],
        "with_several_labels": len(known["with_several_labels"]),
        "tokenizer": tokenizer.digest,
    }


def notes(data: DatasetConfig, splits: Splits, train: Encoded, held_out: Encoded) -> Iterator[str]:
    """What a person should hear of a data set, a sentence each."""
    reading = splits.reading
    if reading.bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in reading.bad.most_common())
        yield (
            f"bad rows were left out: {sum(reading.bad.values())} ({reasons}); they are listed in "
            "data/bad_rows.jsonl of the run"
        )
    if reading.empty:
        yield f"{reading.empty} rows say nothing and were left out"
    if reading.conflicts:
        shown = ", ".join(reading.conflicts[:3]) + (", …" if len(reading.conflicts) > 3 else "")
        yield f"{len(reading.conflicts)} texts have several labels and were kept: {shown}"
    limit = f"dataset.sequence_length={data.sequence_length} tokens"
    longest = max(train.longest, held_out.longest)
    for word, of_train, of_held_out in (
        ("are longer than {} and were left out", train.dropped, held_out.dropped),
        ("are longer than {} and were cut off", train.truncated, held_out.truncated),
        ("have a question that fills {}, and were left out", train.no_answer, held_out.no_answer),
    ):
        if of_train or of_held_out:
            yield (
                f"{of_train} rows to train on and {of_held_out} to evaluate on {word.format(limit)}; the "
                f"longest has {longest}"
            )
    marks = train.marks + held_out.marks
    if marks:
        yield (
            f"{marks} times a text says what begins a turn or ends a text, such as <reserved_106>; these are "
            "ordinary characters to the model"
        )
    if not len(held_out.examples):
        yield "no held-out row is left: nothing is evaluated"
