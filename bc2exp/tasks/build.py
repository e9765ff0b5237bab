"""What the training tasks share: from a configuration to the parts of a training, one function a part."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bc2exp.config.errors import UserError
from bc2exp.config.hardware import HardwareConfig
from bc2exp.config.model import ModelConfig
from bc2exp.config.parallelism import AXES, degrees, shares
from bc2exp.config.root import Config
from bc2exp.config.task import OptimizerConfig, PretrainConfig
from bc2exp.hardware.base import Ops
from bc2exp.hardware.eager import with_twins
from bc2exp.model.baichuan2 import Baichuan2, initial_tensor, parameter_count
from bc2exp.parallel.layout import Layout, parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.shard import local
from bc2exp.parallel.world import World
from bc2exp.text.tokenizer import Tokenizer
from bc2exp.tracking.journal import Journal, NullJournal
from bc2exp.train.checkpoint import Checkpoints, Progress
from bc2exp.train.optimizer import build_optimizer, lr_schedule
from bc2exp.train.throughput import Throughput, flops_per_token
from bc2exp.weights.hf import load_hf_into, save_hf


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
        return Baichuan2(
            vocab_size=vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            position=model.position.value,
            rms_norm_eps=model.rms_norm_eps,
            rope_theta=model.rope_theta,
            z_loss_weight=model.z_loss_weight,
            ops=ops,
        )


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


def fill(layout: Layout, model: ModelConfig, *, seed: int, init_std: float) -> None:
    """Give this rank storage and weights: fresh ones, alike in every layout, or those of `model.weights`."""
    layout.take_storage()
    if model.weights is None:
        for name in layout.own_names():
            layout.assign(name, initial_tensor(name, layout.parts.shapes[name], seed=seed, std=init_std))
        return
    try:
        load_hf_into(
            layout.model,
            Path(model.weights),
            assign=lambda name, parameter, tensor: layout.assign(name, tensor),
            shapes=layout.parts.shapes,
        )
    except ValueError as error:
        raise UserError(f"model.weights={model.weights}: {error}") from None


def make_throughput(model: nn.Module, config: Config, vocab_size: int, global_batch: int) -> Throughput:
    """The measure of a run's speed. The model is not yet sharded, so its parameters can be counted."""
    return Throughput(
        global_batch=global_batch,
        sequence_length=config.dataset.sequence_length,
        num_devices=config.hardware.num_devices,
        flops_per_token=flops_per_token(
            num_parameters=parameter_count(model),
            vocab_size=vocab_size,
            hidden_size=config.model.hidden_size,
            num_layers=config.model.num_layers,
            sequence_length=config.dataset.sequence_length,
        ),
        peak_tflops=config.hardware.peak_tflops,
        rehearsal=config.hardware.rehearsal,
    )


def make_optimizer(model: nn.Module, config: OptimizerConfig, hardware: HardwareConfig) -> torch.optim.AdamW:
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
    folder: Path, task: PretrainConfig, world: World, journal: Journal | NullJournal
) -> Checkpoints:
    """The checkpoints of the run in `folder`."""
    return Checkpoints(
        folder / "checkpoints",
        keep=task.keep_checkpoints,
        world=world,
        tell=lambda text: journal.event("note", text=text),
    )


def go_on(checkpoints: Checkpoints, layout: Layout, optimizer: torch.optim.Optimizer, steps: int) -> Progress:
    """Load the newest checkpoint, if there is one; how far the training is then.

    Raises UserError where it is already beyond `steps`.
    """
    progress = checkpoints.load_newest(layout, optimizer) or Progress(0, 0)
    if progress.step > steps:
        raise UserError(f"task.steps={steps}: this run has done {progress.step} already; name more")
    return progress


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
        config={
            "vocab_size": vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_layers": shape.num_layers,
            "num_heads": shape.num_heads,
            "position": shape.position.value,
            "max_positions": shape.max_positions,
            "rms_norm_eps": shape.rms_norm_eps,
            "rope_theta": shape.rope_theta,
            "z_loss_weight": shape.z_loss_weight,
        },
        dtype=torch.float32,
        tokenizer=tokenizer.path,
    )
