"""What the training tasks share: from a configuration to the parts of a training, one function a part."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bc2exp.config.errors import UserError
from bc2exp.config.hardware import HardwareConfig
from bc2exp.config.model import ModelConfig
from bc2exp.config.parallelism import AXES, degrees, micro_batch_of, shares
from bc2exp.config.root import Config
from bc2exp.config.task import OptimizerConfig, PretrainConfig
from bc2exp.data.batches import MicroBatch
from bc2exp.hardware.base import Ops
from bc2exp.hardware.eager import with_twins
from bc2exp.hardware.phase import LOAD, SAVE, phase
from bc2exp.model.baichuan2 import Baichuan2, parameter_count
from bc2exp.model.initial import initial_tensor
from bc2exp.parallel.layout import Layout, parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.shard import local
from bc2exp.parallel.world import World
from bc2exp.text.tokenizer import Tokenizer
from bc2exp.tracking.journal import Journal, NullJournal
from bc2exp.train.checkpoint import Checkpoints, Progress
from bc2exp.train.optimizer import AdamW, build_optimizer, lr_schedule
from bc2exp.train.throughput import Throughput, flops_per_token
from bc2exp.train.trainer import Trainer
from bc2exp.weights.hf import load_into, save_hf
from bc2exp.weights.opening import open_weights


def find_vocabulary(model: ModelConfig, tokenizer: Tokenizer, journal: Journal | NullJournal) -> int:
    """Rows of embedding and head: as configured, else the tokenizer's pieces.

    Raises UserError for a tokenizer with more pieces than the model has rows; fewer are noted.
    """
    if model.vocab_size is None:
        return tokenizer.vocab_size
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"model.tokenizer={tokenizer.path}: has {tokenizer.vocab_size} pieces, more than "
            f"model.vocab_size={model.vocab_size} of {model.name}; use the tokenizer the model was made with"
        )
    if tokenizer.vocab_size < model.vocab_size:
        journal.event(
            "note",
            text=f"the tokenizer has {tokenizer.vocab_size} pieces, the model {model.vocab_size} rows: "
            "the rest is never trained on",
        )
    return model.vocab_size


def make_mesh(config: Config, vocab_size: int, world: World) -> Mesh:
    """The ranks, in the axes of the configuration.

    Raises UserError for a vocabulary with fewer words than the tensor-parallel ranks need: where it is the
    tokenizer's, nobody could tell before.
    """
    wanted = {axis: getattr(config.parallelism, axis) for axis in AXES}
    mesh = Mesh(world, **degrees(wanted, world.size))
    if not shares(vocab_size, mesh.tensor):
        raise UserError(
            f"parallelism.tensor={mesh.tensor}: leaves some ranks nothing of the tokenizer's "
            f"{vocab_size} words"
        )
    return mesh


FUSED = ("attention", "rms_norm", "swiglu", "rotary")
"""Operations of which `hardware.fused_<name>` says whether the device's own operator does them."""


def twins(hardware: HardwareConfig) -> tuple[str, ...]:
    """The operations that the configuration leaves to their eager twins."""
    return tuple(name for name in FUSED if not getattr(hardware, f"fused_{name}"))


def make_ops(hardware: HardwareConfig, world: World) -> Ops:
    """The operations of the model, on this rank's device."""
    return with_twins(world.backend.ops, twins(hardware))


def make_model(model: ModelConfig, vocab_size: int, ops: Ops) -> Baichuan2:
    """The model without storage."""
    with torch.device("meta"):
        return Baichuan2(**shape_of(model, vocab_size), ops=ops)


def shape_of(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The shape of a model, as keyword arguments of `Baichuan2`."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "position": model.position.value,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "z_loss_weight": model.z_loss_weight,
    }


def lay_out(model: Baichuan2, mesh: Mesh, config: Config) -> Layout:
    """The model over the ranks, still without storage."""
    parallelism = config.parallelism
    return parallelize(
        model,
        mesh,
        precision=config.hardware.precision.value,
        zero_stage=parallelism.zero_stage,
        sequence_parallel=parallelism.sequence_parallel,
        recompute=parallelism.recompute.value,
        defer_reduction=parallelism.defer_reduction,
    )


@phase(LOAD)
def fill(layout: Layout, model: ModelConfig, *, seed: int, init_std: float) -> None:
    """Give this rank storage and weights: fresh ones, alike in every layout, or those of `model.weights`."""
    layout.take_storage()
    if model.weights is None:
        for name in layout.own_names():
            layout.assign(name, initial_tensor(name, layout.parts.shapes[name], seed=seed, std=init_std))
        return
    load(layout, Path(model.weights), "model.weights")


@phase(LOAD)
def load(layout: Layout, folder: Path, key: str) -> None:
    """Give this rank its parts of the weights in `folder`, which errors call `key`=`folder`.

    Raises UserError where they are of another model, or the folder is refused.
    """
    try:
        load_into(
            layout.model,
            open_weights(folder, layout.model.shape),
            assign=lambda name, parameter, part: layout.put(name, part),
            shapes=layout.parts.shapes,
            slices=layout.parts.slices,
        )
    except ValueError as error:
        raise UserError(f"{key}={folder}: {error}") from None


def make_throughput(
    model: nn.Module,
    config: Config,
    vocab_size: int,
    global_batch: int,
    *,
    mean_length: float | None = None,
    labelled: float = 1.0,
) -> Throughput:
    """The measure of a run's speed. The model is not yet sharded, so its parameters can be counted.

    Args:
        mean_length: tokens of a sample, where samples differ.
        labelled: part of the tokens that have a label.
    """
    return Throughput(
        global_batch=global_batch,
        sequence_length=config.dataset.sequence_length if mean_length is None else None,
        num_devices=config.hardware.num_devices,
        flops_per_token=flops_per_token(
            num_parameters=parameter_count(model),
            vocab_size=vocab_size,
            hidden_size=config.model.hidden_size,
            num_layers=config.model.num_layers,
            sequence_length=mean_length or config.dataset.sequence_length,
            labelled=labelled,
        ),
        peak_tflops=config.hardware.peak_tflops,
        rehearsal=config.hardware.rehearsal,
    )


def make_optimizer(model: nn.Module, config: OptimizerConfig, hardware: HardwareConfig) -> AdamW:
    """AdamW over the model's parameters, which are laid over the ranks already."""
    return build_optimizer(
        model,
        lr=config.lr,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=hardware.fused_adamw,
    )


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


def make_schedule(task: PretrainConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of each step."""
    return lr_schedule(
        kind=task.schedule.kind.value,
        lr=task.optimizer.lr,
        min_lr=task.schedule.min_lr,
        steps=steps,
        warmup_steps=task.schedule.warmup_steps,
        warmup_fraction=task.schedule.warmup_fraction,
    )


def make_checkpoints(
    folder: Path, task: PretrainConfig, world: World, journal: Journal | NullJournal, origin: dict[str, Any]
) -> Checkpoints:
    """The checkpoints of the run in `folder`; `origin`: what the order of its samples depends on."""
    return Checkpoints(
        folder / "checkpoints",
        keep=task.keep_checkpoints,
        world=world,
        tell=lambda text: journal.event("note", text=text),
        origin=origin,
        accept_changes=task.accept_changes,
    )


@phase(LOAD)
def go_on(checkpoints: Checkpoints, layout: Layout, optimizer: torch.optim.Optimizer, steps: int) -> Progress:
    """Load the newest checkpoint, if there is one; how far the training is then.

    Raises UserError where it is already beyond `steps`.
    """
    progress = checkpoints.load_newest(layout, optimizer) or Progress(0, 0)
    if progress.step > steps:
        raise UserError(f"task.steps={steps}: this run has done {progress.step} already; name more")
    return progress


def make_trainer(
    config: Config,
    folder: Path,
    mesh: Mesh,
    journal: Journal | NullJournal,
    *,
    model: Baichuan2,
    throughput: Throughput,
    steps: int,
    batches: Callable[[int], tuple[Callable[[int], list[MicroBatch]], list[MicroBatch]]],
    origin: dict[str, Any],
    keeps_best: bool = False,
) -> tuple[Trainer, int]:
    """The trainer of the configured run, and the step after which it goes on.

    Args:
        model: without storage; it is laid over the ranks of `mesh` here.
        steps: the last step.
        batches: from the samples of a micro batch to this rank's training batches by step, and its share of
            the held-out samples.
        origin: of the data, what the order of the samples depends on; seed and batch are added here.
        keeps_best: keep the weights of the best evaluation.
    """
    task = config.task
    assert isinstance(task, PretrainConfig)
    layout = lay_out(model, mesh, config)
    fill(layout, config.model, seed=config.seed, init_std=task.init_std)
    optimizer = make_optimizer(layout.model, task.optimizer, config.hardware)
    origin = {**origin, "seed": config.seed, "task.global_batch": task.global_batch}
    checkpoints = make_checkpoints(folder, task, mesh.world, journal, origin)
    progress = go_on(checkpoints, layout, optimizer, steps)
    journal.event("start", step=progress.step, steps=steps, world_size=mesh.world.size)
    share = task.global_batch // mesh.num_data_ranks
    training, held_out = batches(task.micro_batch or micro_batch_of(share, mesh.pipeline))
    trainer = Trainer(
        layout=layout,
        optimizer=optimizer,
        journal=journal,
        checkpoints=checkpoints,
        throughput=throughput,
        batches=training,
        evaluation=held_out,
        lr_at=make_schedule(task, steps),
        steps=steps,
        global_batch=task.global_batch,
        clip_norm=task.optimizer.clip_norm,
        log_every=task.log_every,
        eval_every=task.eval_every,
        save_every=task.save_every,
        stop_file=folder / "stop",
        saves_beside=task.save_beside,
        keeps_best=keeps_best,
        best=progress.best,
    )
    return trainer, progress.step


@phase(SAVE)
def export(layout: Layout, shape: ModelConfig, vocab_size: int, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the weights in HF layout with the tokenizer beside them; every rank must call it."""
    tensors = layout.parts.whole(lambda name: local(layout.model.get_parameter(name).detach()))
    if layout.mesh.world.rank != 0:
        for _ in tensors:
            raise AssertionError("only rank 0 gets whole tensors")
        return
    if folder.exists():  # of an earlier end of this same run, now trained further
        shutil.rmtree(folder)
    save_hf(
        tensors,
        folder,
        config={**shape_of(shape, vocab_size), "max_positions": shape.max_positions},
        dtype=torch.float32,
        tokenizer=tokenizer.path,
    )
