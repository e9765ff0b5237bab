"""Is this machine fit for the configured run? Operations, collectives and one step, each with a verdict."""

from __future__ import annotations

import math
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bc2exp.config.root import Config
from bc2exp.config.task import DoctorConfig
from bc2exp.data.batches import MicroBatch
from bc2exp.hardware.checkup import Shapes, compare
from bc2exp.model.positions import alibi_slopes
from bc2exp.parallel.exchange_check import measure
from bc2exp.parallel.layout import Layout
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.world import World
from bc2exp.storage import atomic
from bc2exp.tasks import build
from bc2exp.text.tokenizer import Tokenizer, find_tokenizer
from bc2exp.tracking.journal import Journal, NullJournal

_LONGEST = 256
"""Tokens of the operations' input: two blocks of every kernel that works in blocks of 128."""
_ELEMENTS = 2**22
_LAYERS = 2
_LOSS_TOLERANCE = 0.2


def doctor(config: Config, folder: Path, world: World, journal: Journal | NullJournal) -> str:
    """Check the device, the exchanges and one training step; leaves `doctor.json` in `folder`."""
    task = config.task
    assert isinstance(task, DoctorConfig)
    tokenizer = Tokenizer(find_tokenizer(config.model.tokenizer, config.model.weights))
    vocab_size = build.find_vocabulary(config.model, tokenizer, journal)
    mesh = build.make_mesh(config, vocab_size, world)
    checks = [versions(world)]
    checks += operations(config, mesh)
    checks += exchanges(mesh)
    checks.append(one_step(config, task, mesh, vocab_size))
    for check in checks:
        journal.event("check", **check)
    if world.rank == 0:
        atomic.write_json(
            folder / "doctor.json", {"checks": checks, "passed": all(c["passed"] for c in checks)}
        )
    return "done"


def check(name: str, passed: bool, found: str, fix: str = "") -> dict[str, Any]:
    """One line of the report; `fix` is shown where it did not pass."""
    return {"name": name, "passed": passed, "found": found, "fix": "" if passed else fix}


def versions(world: World) -> dict[str, Any]:
    """What runs here, and whether every rank runs the same."""
    packages = ("torch", *world.backend.packages)
    mine = [f"{name} {_version(name)}" for name in packages]
    every = world.gather([f"Python {platform.python_version()}", *mine])
    return check(
        "versions",
        all(found == every[0] for found in every),
        ", ".join(every[0]),
        f"the ranks differ, install the same everywhere: {'; '.join(sorted({', '.join(f) for f in every}))}",
    )


def operations(config: Config, mesh: Mesh) -> list[dict[str, Any]]:
    """The device's operations beside their eager twins, in the shapes of this rank's part of the model."""
    shape = config.model
    heads = shape.num_heads // mesh.tensor
    first = mesh.tensor_rank * heads
    shapes = Shapes(
        batch=2,
        length=min(_LONGEST, config.dataset.sequence_length),
        num_heads=heads,
        head_dim=shape.hidden_size // shape.num_heads,
        inner=max(1, shape.intermediate_size // mesh.tensor),
    )
    slopes = alibi_slopes(shape.num_heads, torch.device("cpu"))[first : first + heads]
    world, found = mesh.world, []
    for result in compare(world.backend.ops, world.device, shapes, slopes, seed=config.seed):
        dtype = str(result.dtype).removeprefix("torch.")
        worst = max(
            world.gather((max(result.forward, result.backward), result.problem, result.passed)), key=_badness
        )
        value = worst[1].splitlines()[0] if worst[1] else f"largest relative error {worst[0]:.1e}"
        found.append(
            check(
                f"{result.name}, {dtype}",
                worst[2],
                f"{value} ({result.allowed:.0e} allowed)",
                "driver, runtime and torch do not fit together, or this operator is wrong here: reinstall "
                "the pair that their maker names, or switch the fused operator off in the hardware file",
            )
        )
    return found


def _badness(result: tuple[float, str, bool]) -> tuple[bool, float]:
    error, _, passed = result
    return not passed, math.inf if math.isnan(error) else error


def exchanges(mesh: Mesh) -> list[dict[str, Any]]:
    """The collectives of every axis of the layout."""
    size = mesh.world.size
    found = measure(mesh, -(-_ELEMENTS // size) * size)
    return [
        check(
            f"{result.name} of {result.ranks}",
            result.passed,
            f"{result.gb_s:.2f} GB/s leave a rank" if result.passed else "wrong values",
            "the ranks' network gives wrong values: check links and drivers before any training",
        )
        for result in found
    ]


def one_step(config: Config, task: DoctorConfig, mesh: Mesh, vocab_size: int) -> dict[str, Any]:
    """One optimizer step on random tokens in the chosen layout, of a model of two layers a stage.

    An untrained model knows nothing of random tokens: its loss is about the logarithm of the vocabulary.
    """
    shape = replace(
        config.model, weights=None, num_layers=min(config.model.num_layers, _LAYERS * mesh.pipeline)
    )
    layout = build.lay_out(
        build.make_model(shape, vocab_size, build.make_ops(config.hardware, mesh.world)), mesh, config
    )
    build.fill(layout, shape, seed=config.seed, init_std=task.init_std)
    optimizer = build.make_optimizer(layout.model, task.optimizer, config.hardware)
    loss, norm = _step(layout, config, task, vocab_size)
    optimizer.step()
    peak = max(mesh.world.gather(mesh.world.backend.peak_memory_bytes())) / 2**30
    expected = math.log(vocab_size)
    fine = math.isfinite(norm) and abs(loss / expected - 1) <= _LOSS_TOLERANCE
    return check(
        "one training step",
        fine,
        f"loss {loss:.3f} (about {expected:.3f} expected), gradient norm {norm:.3g}, "
        f"peak memory {peak:.2f} GiB",
        "the operations above are right and the step is not: run the same with hardware=cpu and compare, and "
        "report both lines",
    )


def _step(layout: Layout, config: Config, task: DoctorConfig, vocab_size: int) -> tuple[float, float]:
    mesh, length = layout.mesh, config.dataset.sequence_length
    rows = task.micro_batch
    generator = torch.Generator().manual_seed(config.seed + mesh.data_rank)
    batch = []
    for _ in range(mesh.pipeline):
        tokens = torch.randint(1, vocab_size, (rows, length + 1), generator=generator)
        batch.append(MicroBatch(tokens[:, :-1], tokens[:, 1:], list(range(rows))))
    labels = mesh.num_data_ranks * len(batch) * rows * length
    losses = layout.train(batch, mesh.num_data_ranks / labels)
    mine = losses.sum() if mesh.speaks_for_loss else losses.new_zeros(())
    sums = mesh.world.sum(torch.stack((mine, layout.finish())))
    return sums[0].item() / labels, math.sqrt(sums[1].item())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
