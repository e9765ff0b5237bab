"""A small training in any layout: both kinds of model, packed segments, labels unevenly spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bc2exp.data.batches import MicroBatch
from bc2exp.hardware import get_backend
from bc2exp.model import Baichuan2, initial_tensor
from bc2exp.parallel.layout import Layout, parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.shard import local
from bc2exp.parallel.world import World
from bc2exp.train.optimizer import build_optimizer
from bc2exp.train.throughput import Throughput
from bc2exp.train.trainer import Trainer
from tests.train.parts import Memory, NoCheckpoints

# 203 words come out even on no number of ranks, three layers on no two stages. 24 heads are no power of two,
# so the slopes take the uneven path.
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 64, "intermediate_size": 88, "num_layers": 3, "num_heads": 8, "position": "rope"},
    "13b": {
        "hidden_size": 384,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 24,
        "position": "alibi",
    },
}
VOCABULARY, LENGTH, GLOBAL_BATCH, CLIP = 203, 32, 8, 0.5


@dataclass(frozen=True)
class Case:
    """A layout: degrees, and the other arguments of `parallelize`."""

    degrees: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Ranks."""
        return torch.Size(self.degrees.values()).numel()


SEQUENCE = {"sequence_parallel": True}
CASES = {
    "single": Case(),
    "ddp2": Case({"replicate": 2}),
    "zero2 2": Case({"shard": 2}, {"zero_stage": 2}),
    "zero3 2": Case({"shard": 2}, {"zero_stage": 3}),
    "zero3 2, deferred": Case({"shard": 2}, {"zero_stage": 3, "defer_reduction": True}),
    "tp2": Case({"tensor": 2}, SEQUENCE),
    "tp2, whole sequence": Case({"tensor": 2}),
    "pp2": Case({"pipeline": 2}),
    "zero3 4": Case({"shard": 4}, {"zero_stage": 3}),
    "hsdp4": Case({"replicate": 2, "shard": 2}, {"zero_stage": 3}),
    "tp4": Case({"tensor": 4}, SEQUENCE),
    "tp2 x zero2 2": Case({"shard": 2, "tensor": 2}, {"zero_stage": 2, **SEQUENCE}),
    "tp2 x zero3 2": Case({"shard": 2, "tensor": 2}, {"zero_stage": 3, **SEQUENCE}),
    "tp2 x pp2": Case({"pipeline": 2, "tensor": 2}, SEQUENCE),
    "pp2 x zero3 2": Case({"pipeline": 2, "shard": 2}, {"zero_stage": 3}),
    "tp8": Case({"tensor": 8}, SEQUENCE),
    "tp2 x pp2 x dp2": Case({"pipeline": 2, "replicate": 2, "tensor": 2}, SEQUENCE),
    "tp2 x pp2 x zero3 2": Case({"pipeline": 2, "shard": 2, "tensor": 2}, {"zero_stage": 3, **SEQUENCE}),
}


def value_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights wide enough for every part to matter, not so wide that rounding grows; norms other than 1."""
    value = initial_tensor(name, shape, seed=3, std=shape[-1] ** -0.5)
    if name.endswith("norm.weight"):
        value.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return value


def model_of(kind: str, **changes: Any) -> Baichuan2:
    """The model of a kind without storage."""
    with torch.device("meta"):
        return Baichuan2(
            **{"vocab_size": VOCABULARY, "z_loss_weight": 0.01, **SHAPES[kind], **changes},
            ops=get_backend("cpu").ops,
        )


def laid_out(
    world: World,
    kind: str,
    case: Case,
    precision: str = "fp32",
    recompute: str = "none",
    **changes: Any,
) -> Layout:
    """The model of a kind, with changes of its shape, in a layout, with its weights."""
    layout = parallelize(
        model_of(kind, **changes),
        Mesh(world, **case.degrees),
        precision=precision,
        recompute=recompute,
        **case.options,
    )
    layout.take_storage()
    for name in layout.own_names():
        layout.assign(name, value_of(name, layout.parts.shapes[name]))
    return layout


def sample(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and segments of a sample: two or three texts and some padding. Early samples of a step
    have few labels, late ones many, so that ranks have different numbers."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(1, VOCABULARY, (LENGTH + 1,), generator=generator)
    tokens[torch.randint(0, LENGTH, (2,), generator=generator)] = 0  # the padding word, also inside a text
    cuts = torch.sort(torch.randint(3, LENGTH - 3, (2,), generator=generator)).values
    segments = torch.ones(LENGTH + 1, dtype=torch.int64)
    segments[cuts[0] :] += 1
    segments[cuts[1] :] += 1
    segments[LENGTH - number % 4 :] = 0
    labels = tokens[1:].clone()
    labels[segments[1:] != segments[:-1]] = -100
    labels[segments[:-1] == 0] = -100
    labels[torch.rand(LENGTH, generator=generator) > (number % GLOBAL_BATCH + 0.5) / GLOBAL_BATCH] = -100
    return tokens[:-1], labels, segments[:-1]


def batches_of(step: int, mesh: Mesh) -> list[MicroBatch]:
    """This rank's micro batches of a step, at least two of them."""
    share = GLOBAL_BATCH // mesh.num_data_ranks
    rows = 2 if share >= 4 else 1
    first = step * GLOBAL_BATCH + mesh.data_rank * share
    parts = []
    for start in range(first, first + share, rows):
        numbers = list(range(start, start + rows))
        tokens, labels, segments = (torch.stack(all) for all in zip(*map(sample, numbers), strict=True))
        parts.append(MicroBatch(tokens, labels, numbers, segments))
    return parts


def trainer_of(layout: Layout, optimizer: torch.optim.Optimizer, **changes: Any) -> Trainer:
    """A trainer over 5 steps that clips."""
    parts: dict[str, Any] = {
        "layout": layout,
        "optimizer": optimizer,
        "journal": Memory(),
        "checkpoints": NoCheckpoints(Path("nowhere")),
        "throughput": Throughput(GLOBAL_BATCH, LENGTH, layout.mesh.world.size, 1.0, None),
        "batches": lambda step: batches_of(step, layout.mesh),
        "evaluation": batches_of(0, layout.mesh),
        "lr_at": lambda step: 0.003,
        "steps": 5,
        "global_batch": GLOBAL_BATCH,
        "clip_norm": CLIP,
        "log_every": 1,
        "eval_every": 2,
        "save_every": None,
        "stop_file": Path("nowhere/stop"),
        **changes,
    }
    return Trainer(**parts)


def adamw(layout: Layout) -> torch.optim.Optimizer:
    """The optimizer of the tests."""
    return build_optimizer(layout.model, lr=0.003, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


@dataclass
class Result:
    """What a training came to, as rank 0 has it; gradients are those of the first step, clipped."""

    losses: list[float]
    norms: list[float]
    evaluations: list[float]
    gradients: dict[str, torch.Tensor]


def train(
    world: World,
    kind: str,
    case: Case,
    recompute: str = "none",
    precision: str = "fp32",
    steps: int = 5,
    changes: dict[str, Any] | None = None,
) -> Result:
    """Train in a layout a model of a kind, with changes of its shape."""
    layout = laid_out(world, kind, case, precision, recompute=recompute, **changes or {})
    optimizer = adamw(layout)
    gradients: dict[str, torch.Tensor] = {}

    def read(name: str) -> torch.Tensor:
        gradient = layout.model.get_parameter(name).grad
        assert gradient is not None, name
        return local(gradient)

    def keep(*_: Any) -> None:
        if not gradients:
            gradients.update((name, tensor.clone()) for name, tensor in layout.parts.whole(read))
            gradients.setdefault("", torch.zeros(0))  # the ranks other than 0, too, do this once

    optimizer.register_step_pre_hook(keep)
    trainer = trainer_of(layout, optimizer, steps=steps)
    trainer.run(0)
    gradients.pop("", None)
    series = trainer.journal.series
    found = Result(series("train/loss"), series("train/grad_norm"), series("eval/loss"), gradients)
    return found if world.rank == 0 else Result(found.losses, found.norms, found.evaluations, {})


@dataclass
class Difference:
    """How far two trainings are apart, relatively: the largest difference of a step."""

    loss: float
    norm: float
    evaluation: float
    gradient: float  # of the first step, of the worst weight, relative to that weight's own gradient
    weight: str

    def worst(self) -> float:
        """The largest of all."""
        return max(self.loss, self.norm, self.evaluation, self.gradient)


def difference(one: Result, other: Result) -> Difference:
    """`one` against the reference `other`."""
    assert one.gradients.keys() == other.gradients.keys()
    apart = {
        name: ((one.gradients[name] - gradient).norm() / gradient.norm()).item()
        for name, gradient in other.gradients.items()
    }
    worst = max(apart, key=lambda name: apart[name])
    series = (
        max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in (
            (one.losses, other.losses),
            (one.norms, other.norms),
            (one.evaluations, other.evaluations),
        )
    )
    return Difference(*series, apart[worst], worst)
