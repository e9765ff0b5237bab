"""Is this machine fit for the configured run? Operations, collectives and one step, each with a verdict."""

from __future__ import annotations

import math
import platform
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bc2exp.config.errors import UserError
from bc2exp.config.hardware import HardwareConfig
from bc2exp.config.parallelism import AXES
from bc2exp.config.root import Config
from bc2exp.config.task import DoctorConfig
from bc2exp.data.batches import MicroBatch
from bc2exp.hardware import eager
from bc2exp.hardware.checkup import Comparison, Shapes, compare, compare_adamw
from bc2exp.model.positions import alibi_slopes
from bc2exp.parallel.exchange_check import measure
from bc2exp.parallel.layout import Layout
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.world import World
from bc2exp.storage import atomic
from bc2exp.tasks import build
from bc2exp.text.tokenizer import Tokenizer, find_tokenizer
from bc2exp.tracking.journal import Journal, NullJournal
from bc2exp.train import TrainingError

_LONGEST = 256
"""Tokens of the operations' input: two blocks of every kernel that works in blocks of 128."""
_ELEMENTS, _FEW_ELEMENTS = 2**22, 2**16
"""Of a collective whose speed counts, and of one that only has to be right."""
_WEIGHTS = 2**16
_FREE = 0.9
"""Part of a device's memory that is free where nobody else computes, and part of the declared memory that is
there; the rest is the runtime's."""
_NOT_ENDED = "the error that ended it is printed above; set it right, and run the same again"
_LAYERS = 2
_LOSS_TOLERANCE = 0.2


def doctor(config: Config, folder: Path, world: World, journal: Journal | NullJournal) -> str:
    """Check the device, the exchanges and one training step; leaves `doctor.json` in `folder`.

    Raises TrainingError where a check cannot be brought to an end; `doctor.json` names it then.
    """
    task = config.task
    assert isinstance(task, DoctorConfig)
    tokenizer = Tokenizer(find_tokenizer(config.model.tokenizer, config.model.weights))
    vocab_size = build.find_vocabulary(config.model, tokenizer, journal)
    mesh = build.make_mesh(config, vocab_size, world)
    stages: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = [
        ("versions", lambda: [versions(world)]),
        ("devices", lambda: [devices(config.hardware, world)]),
        ("operations", lambda: operations(config, mesh)),
        ("exchanges", lambda: exchanges(mesh, timed=not config.hardware.rehearsal)),
        ("one training step", lambda: [one_step(config, task, mesh, vocab_size)]),
    ]
    checks: list[dict[str, Any]] = []
    for name, stage in stages:
        journal.event("note", text=f"checking: {name}")
        # A rank that is ended in the midst of it leaves this.
        _write(folder, config, world, [*checks, check(name, False, "did not end", _NOT_ENDED)])
        found = _do(name, stage, world)
        for one in found:
            journal.event("check", **one)
        checks += found
    _write(folder, config, world, checks)
    return "done"


def _do(name: str, stage: Callable[[], list[dict[str, Any]]], world: World) -> list[dict[str, Any]]:
    """The checks of a stage. One that raises is told in a sentence: the others may wait for this rank in an
    exchange that never ends, so there is no verdict to agree on."""
    try:
        return stage()
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        traceback.print_exception(error)
        raise TrainingError(
            f"task=doctor: {name}: rank {world.rank} is out of memory ({str(error).splitlines()[0]}); end "
            "what else holds memory of its device, or let task=plan say which layouts fit"
        ) from error
    except Exception as error:
        traceback.print_exception(error)
        first = (str(error).splitlines() or [""])[0]
        raise TrainingError(
            f"task=doctor: {name}: rank {world.rank} failed with {type(error).__name__}: {first}; the trace "
            f"is in logs/rank-{world.rank}.log of the run folder"
        ) from error


def _write(folder: Path, config: Config, world: World, checks: list[dict[str, Any]]) -> None:
    if world.rank == 0:
        passed = all(check["passed"] for check in checks)
        report = {"rehearsal": config.hardware.rehearsal, "checks": checks, "passed": passed}
        atomic.write_json(folder / "doctor.json", report)


def check(name: str, passed: bool, found: str, fix: str = "") -> dict[str, Any]:
    """One line of the report; `fix` is shown where it did not pass."""
    return {"name": name, "passed": passed, "found": found, "fix": "" if passed else fix}


def versions(world: World) -> dict[str, Any]:
    """What runs here, and whether every rank runs the same. `Backend.setup` saw to it that packages pair."""
    packages = ("torch", *world.backend.packages)
    mine = [f"{name} {_version(name)}" for name in packages]
    mine += [f"{name} {version}" for name, version in world.backend.runtime().items()]
    every = world.gather([f"Python {platform.python_version()}", *mine])
    pair = f"; {' and '.join(packages)} pair" if len(packages) > 1 else ""
    return check(
        "versions",
        all(found == every[0] for found in every),
        ", ".join(every[0]) + pair,
        f"the ranks differ, install the same everywhere: {'; '.join(sorted({', '.join(f) for f in every}))}",
    )


def devices(hardware: HardwareConfig, world: World) -> dict[str, Any]:
    """How many devices of which kind, and whether their memory is there and is what plans are made with."""
    backend = world.backend
    every = world.gather(
        (backend.device_name(), backend.total_memory_bytes() or 0, backend.free_memory_bytes() or 0)
    )
    kinds = Counter((name, total) for name, total, _ in every)
    found = "; ".join(
        f"{count} rank{'s' * (count > 1)} on {name}{f' of {_gib(total)}' if total else ''}"
        for (name, total), count in kinds.items()
    )
    least = min(range(len(every)), key=lambda rank: every[rank][2] / max(every[rank][1], 1))
    _, total, free = every[least]
    if not total:
        return check("devices", True, found)
    smallest = min(total for _, total, _ in every)
    declared = hardware.memory_gib or 0
    fixes = []
    if free < _FREE * total:
        fixes.append(
            f"somebody else holds memory of rank {least}'s device: end that process, or choose another device"
        )
    if declared * 2**30 * _FREE > smallest:
        fixes.append(
            f"hardware.memory_gib={declared:g} is declared: hardware.memory_gib={smallest / 2**30:.0f} makes "
            "plans for the devices that are here"
        )
    found = f"{found}; {_gib(free)} free on rank {least}, which has the least"
    return check("devices", not fixes, found, "; ".join(fixes))


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def operations(config: Config, mesh: Mesh) -> list[dict[str, Any]]:
    """The operations of a run beside their eager twins, in the shapes of this rank's part of the model; and
    the optimizer's."""
    shape, hardware, world = config.model, config.hardware, mesh.world
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
    ops = build.make_ops(hardware, world)
    fused = [name for name in build.FUSED if getattr(ops, name) is not getattr(eager.OPS, name)]
    fused += ["adamw"] if hardware.fused_adamw else []
    found = list(compare(ops, world.device, shapes, slopes, seed=config.seed))
    found.append(compare_adamw(world.device, _WEIGHTS, config.seed, fused=hardware.fused_adamw))
    return [_operation(result, world, result.name in fused) for result in found]


def _operation(result: Comparison, world: World, fused: bool) -> dict[str, Any]:
    error, problem, passed = max(
        world.gather((max(result.forward, result.backward), result.problem, result.passed)), key=_badness
    )
    value = problem.splitlines()[0] if problem else f"largest relative error {error:.1e}"
    unfit = "driver, runtime and torch do not fit together: install the versions that their maker pairs"
    fix = (
        f"this operator is wrong here: hardware.fused_{result.name}=false takes its eager twin instead; "
        f"where that fails, too, {unfit}"
    )
    return check(
        ", ".join(part for part in (result.name, result.case, _short(result.dtype)) if part),
        passed,
        f"{value} ({result.allowed:.0e} allowed){'' if fused else ', eager'}",
        fix if fused else unfit,
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _badness(result: tuple[float, str, bool]) -> tuple[bool, float]:
    error, _, passed = result
    return not passed, math.inf if math.isnan(error) else error


def exchanges(mesh: Mesh, *, timed: bool) -> list[dict[str, Any]]:
    """The collectives of every axis of the layout; `timed`: how fast, too."""
    size, elements = mesh.world.size, _ELEMENTS if timed else _FEW_ELEMENTS
    found = measure(mesh, -(-elements // size) * size, timed=timed)
    return [
        check(
            f"{result.name} of {result.ranks}",
            result.passed,
            _rate(result.gb_s) if result.passed else "wrong values",
            "the ranks' network gives wrong values: check links and drivers before any training",
        )
        for result in found
    ]


def _rate(gb_s: float | None) -> str:
    return "right; rehearsal: speed not measured" if gb_s is None else f"right; {gb_s:.2f} GB/s leave a rank"


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
        f"{_layout(config, mesh)}: loss {loss:.3f} (about {expected:.3f} expected), "
        f"gradient norm {norm:.3g}, peak memory {peak:.2f} GiB",
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


def _layout(config: Config, mesh: Mesh) -> str:
    degrees = [f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1]
    return ", ".join([*(degrees or ["one rank"]), config.hardware.precision.value])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
