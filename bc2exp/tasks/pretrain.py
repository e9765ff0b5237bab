"""Next-token training on plain text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bc2exp.config.dataset import DatasetConfig
from bc2exp.config.root import Config
from bc2exp.config.task import PretrainConfig
from bc2exp.data.batches import MicroBatch, evaluation_batches, training_batches
from bc2exp.data.tokens import TokenStream, require_samples
from bc2exp.parallel.world import World
from bc2exp.tasks import build
from bc2exp.tasks.out_of_memory import telling_what_fits
from bc2exp.tasks.prepare import PARTS, described, open_store
from bc2exp.text.tokenizer import Tokenizer, find_tokenizer
from bc2exp.tracking.journal import Journal, NullJournal


@telling_what_fits
def pretrain(config: Config, folder: Path, world: World, journal: Journal | NullJournal) -> str:
    """Train a model on text; leaves checkpoints, the journal and the final weights in `folder`."""
    task, length = config.task, config.dataset.sequence_length
    assert isinstance(task, PretrainConfig)
    tokenizer = Tokenizer(find_tokenizer(config.model.tokenizer, config.model.weights))
    vocab_size = build.find_vocabulary(config.model, tokenizer, journal)
    train, held_out = read_streams(config.dataset, tokenizer, vocab_size, journal)
    steps = build.total_steps(task, train.num_samples(length))
    mesh = build.make_mesh(config, vocab_size, world)
    model = build.make_model(config.model, vocab_size, build.make_ops(config.hardware, world))
    throughput = build.make_throughput(model, config, vocab_size, task.global_batch)

    def batches(micro_batch: int) -> tuple[Callable[[int], list[MicroBatch]], list[MicroBatch]]:
        common: dict[str, Any] = {
            "sequence_length": length,
            "micro_batch": micro_batch,
            "rank": mesh.data_rank,
            "num_ranks": mesh.num_data_ranks,
            "separate_documents": config.dataset.separate_documents,
        }
        return (
            training_batches(train, global_batch=task.global_batch, seed=config.seed, **common),
            evaluation_batches(held_out, num_samples=task.eval_samples, **common),
        )

    trainer, start = build.make_trainer(
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
            "dataset.sequence_length": length,
            "dataset.separate_documents": config.dataset.separate_documents,
        },
    )
    outcome = trainer.run(start)
    if outcome == "done":
        build.export(trainer.layout, config.model, vocab_size, tokenizer, folder / "weights")
    return outcome


def read_streams(
    data: DatasetConfig, tokenizer: Tokenizer, vocab_size: int, journal: Journal | NullJournal
) -> tuple[TokenStream, TokenStream]:
    """The training and the held-out tokens of the data set, recorded in the journal."""
    store, _ = open_store(data, tokenizer, journal)
    store.check_vocabulary(vocab_size)
    streams = dict(zip(PARTS, store.streams(data.split), strict=True))
    require_samples(streams["train"], data.sequence_length, f"the training part of {data.name}")
    journal.event("data", **described(data, tokenizer, streams))
    if not streams["held_out"].num_samples(data.sequence_length):
        size = f"dataset.sequence_length={data.sequence_length}"
        journal.event(
            "note", text=f"the held-out part of {data.name} fills no sample of {size}: nothing is evaluated"
        )
    return streams["train"], streams["held_out"]
