"""Which layouts can be: the degrees against the devices, the model, the samples of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bc2exp.config.parallelism import AXES, degrees, micro_batch_of, shares


def layout(values: dict[str, Any], folder: Path) -> list[str]:
    """The degrees cover the devices and fit the model; the batch divides over data ranks and stages."""
    parallelism, devices = values["parallelism"], values["hardware"]["num_devices"]
    wanted = {axis: parallelism[axis] for axis in AXES}
    try:
        found = degrees(wanted, devices)
    except ValueError as error:
        problems = [_cannot_lay_out(values, wanted, str(error))]
    else:
        nearest = _nearest(values, found)
        problems = [
            f"{problem}; nearest choice: {nearest}" if nearest else problem
            for problem in _does_not_fit(values, found)
        ]
        if not problems and "global_batch" in values["task"]:
            problems += _batch_problems(values["task"], found)
    if parallelism["sequence_parallel"] and parallelism["tensor"] == 1:
        problems.append(
            "parallelism.sequence_parallel=true: tensor-parallel ranks share the sequence, but "
            "parallelism.tensor=1; leave it out, or choose parallelism=tp"
        )
    return problems


def _cannot_lay_out(values: dict[str, Any], wanted: dict[str, int], reason: str) -> str:
    """The sentence for degrees that do not cover the devices, with the nearest that do and fit the model."""
    devices = values["hardware"]["num_devices"]
    keys = [axis for axis in AXES if wanted[axis] != 1] or ["replicate"]
    said = ", ".join(f"parallelism.{axis}={wanted[axis]}" for axis in keys)
    if wanted == dict.fromkeys(AXES, 1):
        return f"{said}: hardware.num_devices={devices} needs {devices}; nearest choice: parallelism=ddp"
    nearest = _nearest(values, wanted)
    if not nearest:
        return f"{said}: {reason}, nor in any other way with this model; fewer devices would do"
    simple = "parallelism=single, or " if devices == 1 else ""
    return f"{said}: hardware.num_devices={devices}: {reason}; nearest choice: {simple}{nearest}"


def _nearest(values: dict[str, Any], wanted: dict[str, int]) -> str:
    """The overrides that lead to the nearest degrees that cover the devices and fit the model, or ""."""
    devices = values["hardware"]["num_devices"]
    choices = [
        choice for choice in _factorizations(devices, len(AXES)) if not any(_does_not_fit(values, choice))
    ]
    if not choices:
        return ""

    def distance(choice: dict[str, int]) -> float:
        return sum(abs(math.log(choice[axis] / wanted[axis])) for axis in AXES if wanted[axis] > 0)

    # Of two as near the one with more data ranks: it asks the least of the wires between devices.
    near = min(choices, key=lambda choice: (distance(choice), -choice["replicate"], -choice["shard"]))
    open_axes = [axis for axis in AXES if wanted[axis] == -1]
    return " ".join(
        f"parallelism.{axis}={near[axis]}"
        for axis in AXES
        if near[axis] != wanted[axis] and [axis] != open_axes  # the one that takes what is left still does
    )


def _factorizations(number: int, parts: int) -> Iterator[dict[str, int]]:
    """Every way to write a number as a product of the degrees of the last `parts` axes."""
    axis = AXES[-parts]
    if parts == 1:
        yield {axis: number}
        return
    for degree in (degree for degree in range(1, number + 1) if number % degree == 0):
        for rest in _factorizations(number // degree, parts - 1):
            yield {axis: degree, **rest}


def _does_not_fit(values: dict[str, Any], found: dict[str, int]) -> Iterator[str]:
    """Why a model cannot be cut so: heads, feed-forward width, vocabulary, sequence, layers."""
    model, tensor, pipeline = values["model"], found["tensor"], found["pipeline"]
    length = values["dataset"]["sequence_length"]
    divided = {"model.num_heads": model["num_heads"]}
    if values["parallelism"]["sequence_parallel"]:
        divided["dataset.sequence_length"] = length
    for key, size in divided.items():
        if size % tensor:
            other = "; parallelism.sequence_parallel=false would do" if key.startswith("dataset") else ""
            yield f"parallelism.tensor={tensor}: does not divide {key}={size}{other}"
    for key in ("vocab_size", "intermediate_size"):
        size = model[key]
        if size is not None and not shares(size, tensor):
            yield f"parallelism.tensor={tensor}: leaves some ranks nothing of model.{key}={size}"
    if pipeline > model["num_layers"]:
        yield (
            f"parallelism.pipeline={pipeline}: model.num_layers={model['num_layers']} leaves stages without "
            "a layer"
        )


def _batch_problems(task: dict[str, Any], found: dict[str, int]) -> Iterator[str]:
    """Samples that do not come out even over data ranks, or micro batches too few for the stages."""
    batch, micro = task["global_batch"], task["micro_batch"]
    ranks, stages = found["replicate"] * found["shard"], found["pipeline"]
    unit = ranks * (micro or 1)
    if batch % unit:
        near = max(unit, round(batch / unit) * unit)
        per_rank = f" x task.micro_batch={micro}" if micro else ""
        yield (
            f"task.global_batch={batch}: not a multiple of {ranks} data-parallel "
            f"rank{'s' * (ranks > 1)}{per_rank} = {unit}; {near} would be"
        )
    elif batch // unit < stages:
        share = batch // ranks
        if share < stages:
            remedy = f"task.global_batch={ranks * stages} would do"
        else:
            remedy = f"task.micro_batch={micro_batch_of(share, stages)} would do"
        number = batch // unit
        yield (
            f"parallelism.pipeline={stages}: a step has {number} micro batch{'es' * (number > 1)} a data "
            f"rank, fewer than stages, so some would always wait; {remedy}"
        )
