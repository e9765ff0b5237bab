"""Next-token training on plain text."""

from __future__ import annotations

import math
from pathlib import Path

from bc2exp.config.dataset import DatasetConfig
from bc2exp.config.errors import UserError
from bc2exp.config.parallelism import micro_batch_of
from bc2exp.config.root import Config
from bc2exp.config.task import PretrainConfig
from bc2exp.data.batches import evaluation_batches, training_batches
from bc2exp.data.tokens import TokenStream, require_samples
from bc2exp.parallel.world import World
from bc2exp.tasks import build
from bc2exp.tasks.out_of_memory import telling_what_fits
from bc2exp.tasks.prepare import PARTS, described, open_store
from bc2exp.text.tokenizer import Tokenizer, find_tokenizer
from bc2exp.tracking.journal import Journal, NullJournal
from bc2exp.train.trainer import Trainer


@telling_what_fits
def pretrain(config: Config, folder: Path, world: World, journal: Journal | NullJournal) -> str:
    """Train a model on text; leaves checkpoints, the journal and the final weights in `folder`."""
    task, length = config.task, config.dataset.sequence_length
    assert isinstance(task, PretrainConfig)
    tokenizer = Tokenizer(find_tokenizer(config.model.tokenizer, config.model.weights))
    vocab_size = build.find_vocabulary(config.model, tokenizer, journal)
    train, held_out = read_streams(config.dataset, tokenizer, vocab_size, journal)
    steps = total_steps(task, train.num_samples(length))
    mesh = build.make_mesh(config, vocab_size, world)
    model = build.make_model(config.model, vocab_size, build.make_ops(config.hardware, world))
    throughput = build.make_throughput(model, config, vocab_size, task.global_batch)
    layout = build.lay_out(model, mesh, config)
    build.fill(layout, config.model, seed=config.seed, init_std=task.init_std)
    optimizer = build.make_optimizer(layout.model, task.optimizer, config.hardware)
    checkpoints = build.make_checkpoints(folder, task, world, journal)
    progress = build.go_on(checkpoints, layout, optimizer, steps)
    journal.event("start", step=progress.step, steps=steps, world_size=world.size)
    share = task.global_batch // mesh.num_data_ranks
    micro_batch = task.micro_batch or micro_batch_of(share, mesh.pipeline)
    trainer = Trainer(
        layout=layout,
        optimizer=optimizer,
        journal=journal,
        checkpoints=checkpoints,
        throughput=throughput,
        batches=training_batches(
            train,
            sequence_length=length,
            global_batch=task.global_batch,
            micro_batch=micro_batch,
            rank=mesh.data_rank,
            num_ranks=mesh.num_data_ranks,
            seed=config.seed,
            separate_documents=config.dataset.separate_documents,
        ),
        evaluation=evaluation_batches(
            held_out,
            sequence_length=length,
            micro_batch=micro_batch,
            rank=mesh.data_rank,
            num_ranks=mesh.num_data_ranks,
            num_samples=task.eval_samples,
            separate_documents=config.dataset.separate_documents,
        ),
        lr_at=build.make_schedule(task, steps),
        steps=steps,
        global_batch=task.global_batch,
        clip_norm=task.optimizer.clip_norm,
        log_every=task.log_every,
        eval_every=task.eval_every,
        save_every=task.save_every,
        stop_file=folder / "stop",
    )
    outcome = trainer.run(progress.step)
    if outcome == "done":
        build.export(layout, config.model, vocab_size, tokenizer, folder / "weights")
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


def total_steps(task: PretrainConfig, num_samples: int) -> int:
    """Optimizer steps of the training: as configured, or of whole global batches in the epochs."""
    if task.steps is not None:
        return task.steps
    assert task.epochs is not None
    steps = math.floor(task.epochs * num_samples / task.global_batch)
    if not steps:
        raise UserError(
            f"task.epochs={task.epochs:g}: {num_samples} samples are fewer than one global batch of "
            f"{task.global_batch}; more epochs, a smaller task.global_batch, or task.steps=1"
        )
    return steps
