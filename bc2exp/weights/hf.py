"""Folders in the published (Hugging Face) layout: config.json, weights in shards and their index.

Read piece by piece from mapped files, written tensor by tensor; nothing is ever unpickled but by torch's
weights-only reader. Names and fields: `hf_layout`.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bc2exp.config.weight_files import (
    INDEXES,
    SAFETENSORS,
    max_positions_of,
    read_config,
    tensor_files,
    weight_kind,
)
from bc2exp.hardware import get_backend
from bc2exp.hardware.base import Ops
from bc2exp.model.baichuan2 import Baichuan2
from bc2exp.storage import atomic
from bc2exp.weights import hf_layout
from bc2exp.weights.containers import open_safetensors, open_torch, plain_tensors
from bc2exp.weights.layout import Weights, differences
from bc2exp.weights.writing import MAX_SHARD_BYTES, Flusher, SafetensorsWriter

INDEX = INDEXES[SAFETENSORS]

Assign = Callable[[str, nn.Parameter, Tensor], None]
"""Puts what was read into the parameter of that name."""
Slices = Callable[[str], tuple[slice, ...]]
"""The rows and columns of a parameter that are to be read."""


def load_hf(folder: Path | str, dtype: torch.dtype = torch.float32, ops: Ops | None = None) -> nn.Module:
    """The model in `folder`, on the CPU, its weights in `dtype`; `ops` default to the CPU's.

    Raises ValueError as `open_hf` does.
    """
    weights = open_hf(folder)
    with torch.device("meta"):
        model = Baichuan2(**weights.shape, ops=ops or get_backend("cpu").ops)
    model.to(dtype).to_empty(device="cpu")
    load_into(model, weights)
    return model


def load_hf_into(
    model: nn.Module,
    folder: Path | str,
    *,
    assign: Assign | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Fill the parameters of `model` with the weights in `folder`; see `open_hf` and `load_into`."""
    load_into(model, open_hf(folder), assign=assign, shapes=shapes)


def load_into(
    model: nn.Module,
    weights: Weights,
    *,
    assign: Assign | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    slices: Slices | None = None,
) -> None:
    """Fill the parameters of `model`, which may be a stage of a pipeline, with `weights`.

    By default each parameter is copied into, in its own type and on its own device. For parameters that
    hold only a part of their tensor give `assign`, the whole shapes by name, and `slices` where no more than
    the part is to be read: `assign` gets what was read, which is a view of the file where that is possible.

    Raises ValueError where a parameter has another shape than in `weights`: one error that names them all.
    """
    problems = []
    for name, parameter in model.named_parameters():
        wanted = tuple(parameter.shape) if shapes is None else shapes[name]
        if weights.shapes.get(name) != wanted:
            there = weights.shapes.get(name, "nothing of that name")
            problems.append(f"the model's {name} {wanted} has no match in the folder, which has {there}")
    if problems:
        raise ValueError(f"does not hold this model: {'; '.join(problems)}")
    for name, parameter in model.named_parameters():
        (assign or _copy)(name, parameter, weights.read(name, *(slices(name) if slices else ())))


def _copy(name: str, parameter: nn.Parameter, tensor: Tensor) -> None:
    parameter.detach().copy_(tensor)


def open_hf(folder: Path | str) -> Weights:
    """The weights of a folder in the published layout.

    Raises ValueError for a folder that is not a Baichuan2 in safetensors or torch's .bin, or whose tensors
    are not those its config.json calls for: one error that names every tensor concerned.
    """
    folder = Path(folder)
    config = read_config(folder)
    shape = hf_layout.from_config(config)
    tensors, absent = read_tensors(folder)
    plan, expected = hf_layout.published_plan(shape), hf_layout.published_shapes(shape)
    problems = differences({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
    problems += [f"in the index only: {name}" for name in absent if name not in expected]
    if problems:
        raise ValueError(f"{folder} does not hold this model, that of its config.json: {'; '.join(problems)}")
    return Weights(plan, tensors, shape, max_positions_of(config))


def read_shape(folder: Path | str) -> dict[str, Any]:
    """The shape of the model in `folder`, as keyword arguments of `Baichuan2`.

    Raises ValueError where config.json is missing, no JSON, or not of a Baichuan2.
    """
    return hf_layout.from_config(read_config(Path(folder)))


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Every tensor in the files of `folder`, mapped; the files an index names, or without one all. And what
    the index names, but no file holds.

    Raises ValueError for damaged and hostile files, and for a tensor that is in two of them or in another
    than the index says.
    """
    kind = weight_kind(folder)
    if kind not in INDEXES:
        raise ValueError(f"{folder} holds shards of ModelLink, not the published layout")
    paths, index = tensor_files(folder, kind)
    tensors: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    for path in paths:
        found = open_safetensors(path) if kind == SAFETENSORS else plain_tensors(_mapping(path), path)
        for name, tensor in found.items():
            if hf_layout.is_derived(name):
                continue
            if name in tensors:
                raise ValueError(f"{path}: holds {name}, which {files[name]} holds, too")
            tensors[name], files[name] = tensor, path.name
    index = {name: file for name, file in (index or {}).items() if not hf_layout.is_derived(name)}
    for name, file in index.items():
        if files.get(name, file) != file:
            raise ValueError(f"{folder / INDEXES[kind]}: {name} is not in {file}, but in {files[name]}")
    return tensors, [name for name in index if name not in files]


def _mapping(path: Path) -> Mapping[Any, Any]:
    value = open_torch(path)
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: holds a {type(value).__name__} and no tensors by name")
    return value


def save_hf(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: Path | str,
    *,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    tokenizer: Path | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model's parameters as `folder`, in the published layout.

    `tensors` are named as in the model; an iterable is drained one by one, and none is held. `config`: see
    `hf_layout.to_config`. `tokenizer` is the SentencePiece file, copied as tokenizer.model.

    The folder appears whole or not at all. Raises ValueError where it exists already, or where `tensors`
    are not those of a model of this shape: one error that names every tensor concerned.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; nothing was written")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
        flusher = Flusher()
        try:
            _write_all(pairs, temporary, config, dtype, max_shard_bytes, flusher)
        finally:
            flusher.close()
        write_beside(temporary, {**config}, dtype, tokenizer)
        atomic.publish_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_all(
    pairs: Iterable[tuple[str, Tensor]],
    folder: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    max_shard_bytes: int,
    flusher: Flusher,
) -> None:
    """Write the shards; ValueError where the tensors are not those of the model."""
    plan, shapes = hf_layout.published_plan(config), hf_layout.published_shapes(config)
    places, sizes = {}, {}
    for key, parts in plan.items():
        row = 0
        for part in parts:
            places[part.name] = (key, row)
            sizes[part.name] = (part.num_rows, *shapes[key][1:])
            row += part.num_rows
    writer = SafetensorsWriter(
        folder, {key: (dtype, shape) for key, shape in shapes.items()}, max_shard_bytes, flusher
    )
    try:
        found: dict[str, tuple[int, ...]] = {}
        for name, tensor in pairs:
            found[name] = tuple(tensor.shape)
            if sizes.get(name) == found[name]:
                key, row = places[name]
                writer.put(key, tensor.detach().to("cpu", dtype), row)
            del tensor  # before the next comes
        problems = differences(found, sizes)
        if problems:
            raise ValueError(f"these tensors are not of a model of this shape: {'; '.join(problems)}")
        writer.finish()
    finally:
        writer.close()


def write_beside(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype, tokenizer: Path | str | None
) -> None:
    """Write what stands beside the weights: config.json, generation_config.json, the tokenizer."""
    atomic.write_json(folder / "config.json", hf_layout.to_config(config, dtype))
    atomic.write_json(folder / "generation_config.json", hf_layout.GENERATION)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
