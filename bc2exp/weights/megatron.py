"""Folders of ModelLink's (Megatron's) shards, converted or trained, opened; layout: `megatron_layout`."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bc2exp.config.convert import uneven
from bc2exp.config.weight_files import (
    DEFAULT_MAX_POSITIONS,
    MANIFEST,
    RANK,
    TRACKER,
    inside,
    shape_differences,
)
from bc2exp.storage.tensors import DamagedCheckpoint, read_manifest
from bc2exp.weights import megatron_layout as names
from bc2exp.weights.containers import open_torch, plain_tensors
from bc2exp.weights.layout import Plan, Weights, differences, stored_shape

FILE = "model_optim_rng.pt"
RELEASE = "release"

_ARGUMENTS = {
    "num_layers": ("num_layers",),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("ffn_hidden_size",),
    "num_heads": ("num_attention_heads",),
    "rms_norm_eps": ("norm_epsilon", "layernorm_epsilon"),
}
"""The sizes of a model, and what Megatron's arguments call them."""


def open_megatron(folder: Path | str, shape: Mapping[str, Any] | None) -> Weights:
    """The weights in a folder of shards: the one above `release` or `iter_...`, or that one itself.

    Args:
        folder: what ModelLink is told to load.
        shape: of the model, as shards do not say how many heads and words it has; None: that of our own
            conversion, which left a manifest.

    Raises ValueError where ranks are missing, files are damaged or hostile, or the tensors, or the arguments
    of the training beside them, are not those of the model.
    """
    folder = Path(folder)
    known = _manifest_shape(folder)
    shape = shape or known
    if shape is None:
        raise ValueError(f"{folder} does not say which model it is of; name it (model=baichuan2_7b)")
    ranks, tensor, pipeline = find_ranks(folder)
    problems = [
        f"it has {degree} {axis} ranks, which do not divide {name}={shape[name]}"
        for name, axis, degree in uneven(shape, tensor, pipeline)
    ]
    problems += shape_differences(known, shape) if known else []
    tensors: dict[str, Tensor] = {}
    plan: dict[str, Any] = {}
    for (rank, stage), path in ranks.items():
        content = _content(path)
        problems += _contradictions(content.get("args"), shape, path)
        found = _tensors(content, path)
        own = _own_plan(found, shape, rank, stage, tensor, pipeline, path) if not problems else {}
        tensors |= {f"{path.parent.name}/{name}": value for name, value in found.items()}
        plan |= {f"{path.parent.name}/{name}": parts for name, parts in own.items()}
    problems = problems or _wrong_tensors(tensors, plan)
    if problems:
        raise ValueError(f"{folder} does not hold this model: {'; '.join(problems)}")
    given = {"max_positions": DEFAULT_MAX_POSITIONS, **(known or {}), **shape}
    max_positions = given.pop("max_positions")
    return Weights(plan, tensors, given, max_positions)


def find_ranks(folder: Path) -> tuple[dict[tuple[int, int], Path], int, int]:
    """The file of every (tensor-parallel rank, stage), and how many there are of both.

    Raises ValueError where some are missing, or the folder names an iteration that is not there.
    """
    place = _iteration(folder)
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(place.iterdir()):
        if match := RANK.fullmatch(path.name):
            if path.is_symlink() or not path.is_dir():
                raise ValueError(f"{path}: is no folder of its own")
            found[int(match[1]), int(match[2] or 0)] = path
    if not found:
        raise ValueError(f"{place} holds no mp_rank_XX folders")
    tensor, pipeline = (max(number) + 1 for number in zip(*found, strict=True))
    missing = [
        names.rank_folder(rank, stage, pipeline)
        for stage in range(pipeline)
        for rank in range(tensor)
        if (rank, stage) not in found
    ]
    if missing:
        raise ValueError(f"{place}: ranks are missing: {', '.join(missing)}")
    return {rank: inside(path, FILE) for rank, path in sorted(found.items())}, tensor, pipeline


def _iteration(folder: Path) -> Path:
    """The folder that holds those of the ranks."""
    if not os.path.lexists(folder / TRACKER):
        return folder
    with open(inside(folder, TRACKER), encoding="utf-8", errors="replace") as file:
        text = file.read(100).strip()
    if text != RELEASE and not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(f"{folder / TRACKER} holds {text!r}, which is neither a number nor {RELEASE}")
    place = folder / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if place.is_symlink() or not place.is_dir():
        raise ValueError(f"{folder / TRACKER} names {place.name}, which is no folder there")
    return place


def _content(path: Path) -> dict[str, Any]:
    """What a rank's file holds."""
    content = open_torch(path, training=True)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__} and no checkpoint")
    if "model" not in content:
        stages = [key for key in content if re.fullmatch(r"model\d+", str(key))]
        reason = "virtual stages (model0, ...), which are not read" if stages else "no model"
        raise ValueError(f"{path}: holds {reason}")
    return content


def _tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a rank, named as in `megatron_layout`."""
    model = content["model"]
    if not isinstance(model, Mapping):
        raise ValueError(f"{path}: its model is a {type(model).__name__}")
    flat = dict(_flat(model.get("language_model", model), path))
    plain = names.plain_names(flat)
    if len(set(plain.values())) < len(plain):
        raise ValueError(f"{path}: holds a tensor under two names")
    return {plain[name]: tensor for name, tensor in plain_tensors({n: flat[n] for n in plain}, path).items()}


def _flat(node: Any, path: Path, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        yield prefix, node
        return
    if depth > 8:
        raise ValueError(f"{path}: {prefix} lies too deep")
    for name, value in node.items():
        yield from _flat(value, path, f"{prefix}.{name}" if prefix else str(name), depth + 1)


def _own_plan(
    found: Mapping[str, Tensor],
    shape: Mapping[str, Any],
    rank: int,
    stage: int,
    tensor: int,
    pipeline: int,
    path: Path,
) -> Plan:
    """What the rank's tensors hold, going by their names and by how many words they have."""
    words = [value.shape[0] for name, value in found.items() if name in (names.EMBEDDING, names.HEAD)]
    size = shape["vocab_size"]
    if len(set(words)) > 1 or any(not size <= rows * tensor <= 2 * size for rows in words):
        raise ValueError(
            f"{path}: has {words[0]} rows of the vocabulary, {words[0] * tensor} on all {tensor} ranks; "
            f"these are not the {size} of the model with or without padding"
        )
    return names.rank_plan(
        shape,
        tensor_rank=rank,
        tensor=tensor,
        stage=stage,
        pipeline=pipeline,
        merged=names.merged_name(found),
        padded=words[0] * tensor if words else size,
    )


def _wrong_tensors(tensors: Mapping[str, Tensor], plan: Plan) -> list[str]:
    """What is missing, superfluous, misshapen, or not alike on the ranks that should have the same."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = differences(shapes, {name: stored_shape(parts) for name, parts in plan.items()})
    if problems:
        return problems
    first: dict[str, str] = {}
    for key, parts in plan.items():
        if parts[0].columns is None:
            other = first.setdefault(parts[0].name, key)
            if not torch.equal(tensors[key].view(torch.uint8), tensors[other].view(torch.uint8)):
                problems.append(f"{key} is not what {other} is, though both are all of {parts[0].name}")
    return problems


def _contradictions(arguments: Any, shape: Mapping[str, Any], path: Path) -> list[str]:
    """Where the arguments of a training, which lie beside its weights, are of another model."""
    if not isinstance(arguments, Namespace):
        return []
    problems = []
    for field, theirs in _ARGUMENTS.items():
        for name in theirs:
            value = getattr(arguments, name, None)
            if value is not None and field in shape and value != shape[field]:
                problems.append(f"{name} is {value} in {path.parent.name}, model.{field} is {shape[field]}")
    position = getattr(arguments, "position_embedding_type", None)
    if position in ("rope", "alibi") and position != shape["position"]:
        problems.append(f"position_embedding_type is {position}, model.position is {shape['position']}")
    return problems


def _manifest_shape(folder: Path) -> dict[str, Any] | None:
    """The shape that our own conversion wrote down; None where it made none of this folder."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    inside(folder, MANIFEST)
    try:
        shape = read_manifest(folder)["extra"]["shape"]
    except (DamagedCheckpoint, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST}: is not what a conversion wrote: {error}") from None
    return dict(shape)
