"""A small model, text of random tokens, and a trainer over both on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bc2exp.data.batches import MicroBatch, evaluation_batches, training_batches
from bc2exp.data.tokens import TokenStream
from bc2exp.hardware import get_backend
from bc2exp.model import Baichuan2, init_weights
from bc2exp.parallel.layout import Layout, parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.shard import local
from bc2exp.parallel.world import World
from bc2exp.tracking.journal import NullJournal
from bc2exp.train.checkpoint import Checkpoints, Progress, Saved
from bc2exp.train.optimizer import build_optimizer
from bc2exp.train.throughput import Throughput
from bc2exp.train.trainer import Trainer

VOCABULARY, LENGTH, GLOBAL_BATCH = 64, 16, 8

ONE_RANK = World(rank=0, size=1, local_rank=0, local_size=1, backend=get_backend("cpu"))


class Descent(torch.optim.SGD):
    """Plain gradient descent that is asked as the trainer asks its optimizer."""

    def step(self, closure=None, *, factor=1.0):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(factor)
        super().step()


class Memory(NullJournal):
    """A journal that is kept in memory: `steps` is {metric: {step: value}}, `events` a list of dicts."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[int, float]] = {}
        self.events: list[dict[str, Any]] = []

    def metrics(self, step, values):
        for name, value in values.items():
            self.steps.setdefault(name, {})[step] = value

    def event(self, name, /, **fields):
        self.events.append({"event": name, **fields})

    def series(self, name: str) -> list[float]:
        return list(self.steps.get(name, {}).values())


def make_model(z_loss_weight: float = 0.0, seed: int = 0) -> Baichuan2:
    model = Baichuan2(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        position="rope",
        z_loss_weight=z_loss_weight,
        ops=get_backend("cpu").ops,
    )
    init_weights(model, seed=seed, std=0.05)
    return model


def laid_out(
    world: World, *, z_loss_weight: float = 0.0, seed: int = 0, precision: str = "fp32", **degrees: int
) -> Layout:
    """The model of `make_model` on the ranks of `world`: copies, unless other degrees are given."""
    degrees = degrees or {"replicate": world.size}
    layout = parallelize(make_model(z_loss_weight, seed), Mesh(world, **degrees), precision=precision)
    return layout


def make_stream(num_samples: int = 40, seed: int = 0) -> TokenStream:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY - 1, (num_samples * LENGTH + 1,), generator=generator)
    return TokenStream(tokens.to(torch.int32), 1)


def make_trainer(
    folder: Path,
    model: Baichuan2 | Layout | None = None,
    *,
    stream: TokenStream | None = None,
    micro_batch: int = GLOBAL_BATCH,
    lr: float = 0.1,
    world: World = ONE_RANK,
    evaluates: bool = False,
    **changes: Any,
) -> Trainer:
    """A trainer over 4 steps with plain gradient descent, whose every difference is a gradient's."""
    model = model or make_model()
    layout = model if isinstance(model, Layout) else parallelize(model, Mesh(world), precision="fp32")
    stream = stream or make_stream()
    mesh = layout.mesh
    share = {"sequence_length": LENGTH, "rank": mesh.data_rank, "num_ranks": mesh.num_data_ranks}
    held_out = make_stream(5, seed=1)
    parts: dict[str, Any] = {
        "layout": layout,
        "optimizer": Descent(layout.model.parameters(), lr=lr),
        "journal": Memory(),
        # Plain gradient descent keeps no moments, so there is nothing that a checkpoint could hold.
        "checkpoints": NoCheckpoints(folder),
        "throughput": Throughput(GLOBAL_BATCH, LENGTH, world.size, 1.0, None),
        "batches": training_batches(
            stream, global_batch=GLOBAL_BATCH, micro_batch=micro_batch, seed=0, **share
        ),
        "evaluation": evaluation_batches(held_out, micro_batch=2, num_samples=None, **share)
        if evaluates
        else [],
        "lr_at": lambda step: lr,
        "steps": 4,
        "global_batch": GLOBAL_BATCH,
        "clip_norm": None,
        "log_every": 1,
        "eval_every": None,
        "save_every": None,
        "stop_file": folder / "stop",
        **changes,
    }
    return Trainer(**parts)


class NoCheckpoints:
    """Remembers when it was asked to save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[int] = []
        self._told = 0

    def save(self, layout, optimizer, progress, *, beside=False):
        assert progress.samples == progress.step * GLOBAL_BATCH
        self.saved.append(progress.step)

    def make_room(self, layout, optimizer):
        """Nothing is copied."""

    def finished(self, *, wait=False):
        if self._told == len(self.saved):
            return None
        self._told = len(self.saved)
        return Saved(self.saved[-1], self.folder / "checkpoints" / f"step-{self.saved[-1]}", ())


def make_checkpoints(
    folder: Path, keep: int = 9, world: World = ONE_RANK, **changes: Any
) -> tuple[Checkpoints, list[str]]:
    """Checkpoints in `folder`, and the list of what they tell."""
    told: list[str] = []
    return Checkpoints(folder / "checkpoints", keep=keep, world=world, tell=told.append, **changes), told


def save(checkpoints: Checkpoints, layout: Layout, optimizer: torch.optim.Optimizer, progress: Progress):
    """Save and wait for it; what was saved, on rank 0."""
    checkpoints.save(layout, optimizer, progress)
    return checkpoints.finished(wait=True)


def adamw(model: Baichuan2 | Layout) -> torch.optim.Optimizer:
    model = model.model if isinstance(model, Layout) else model
    return build_optimizer(model, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def by_hand(*rows: list[int], labels: list[list[int]]) -> MicroBatch:
    """A micro batch of given tokens and labels; its samples are numbered from 0."""
    return MicroBatch(torch.tensor(rows), torch.tensor(labels), list(range(len(rows))))


def weights_of(model):
    """All parameters of a model, whole, as one vector; of copies (`ddp`) or of one rank."""
    model = model.model if isinstance(model, Layout) else model
    return torch.cat([local(parameter.detach()).flatten() for parameter in model.parameters()])
