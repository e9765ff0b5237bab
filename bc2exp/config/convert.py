"""The task `convert`: its keys, and what is told of them at the door."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from bc2exp.config.fields import setting
from bc2exp.config.roots import absolute, nearest
from bc2exp.config.task import TaskConfig
from bc2exp.config.weight_files import (
    MANIFEST,
    MEGATRON,
    read_config,
    read_json,
    shape_of,
    tensor_files,
    weight_kind,
)

MERGED_NAMES = ("proj", "dense_h_to_4h")
"""What gate and up in one matrix are called: by ModelLink at the time of the recipe, and by Megatron."""


class Format(Enum):
    """Layouts of weights."""

    hf = "hf"
    llama = "llama"
    megatron = "megatron"


@dataclass
class ConvertConfig(TaskConfig):
    """Weights from one layout into another."""

    on_devices: ClassVar[bool] = False

    source: str | None = setting(
        "folder of weights: Hugging Face's layout or ModelLink's shards", None, path=True
    )
    target: str | None = setting("folder to be made", None, path=True)
    format: Format = setting(
        "layout of the target: hf, llama (7B kind only) or megatron (ModelLink's shards)"
    )
    dtype: str | None = setting(
        "type of every tensor; null: as in the source", None, choices=("fp32", "bf16", "fp16")
    )
    tensor: int = setting("megatron: tensor-parallel ranks", 1, minimum=1, maximum=100)
    pipeline: int = setting("megatron: stages of the pipeline", 1, minimum=1, maximum=1000)
    merge_mlp: bool = setting("megatron: gate and up in one matrix, as with --merge-mlp", True)
    merged_name: str = setting("megatron: what that matrix is called", "proj", choices=MERGED_NAMES)
    vocab_divisible_by: int = setting(
        "megatron: the padded vocabulary is a multiple of this times task.tensor",
        128,
        minimum=1,
        maximum=2**20,
    )
    max_shard_gb: float = setting("hf, llama: size of a file at most, in 10^9 bytes", 5.0, above=0)
    verify: bool = setting("read the target back from the disk and compare every bit with the source", False)


def conversion(values: dict[str, Any], folder: Path) -> list[str]:
    """What speaks against a conversion, as far as names and small files tell."""
    task = values["task"]
    if task["name"] != "convert":
        return []
    return [*_source(values, folder), *_target(task, folder)]


def _source(values: dict[str, Any], folder: Path) -> Iterator[str]:
    """The source is there, is what it should be, and can be cut as asked."""
    task, model = values["task"], values["model"]
    if task["source"] is None:
        yield "task.source: no value; name the folder with the weights (task.source=FOLDER)"
        return
    source, key = absolute(task["source"], folder), f"task.source={task['source']}"
    if not os.path.isdir(source):
        yield f"{key}: no such folder{nearest(source)}"
        return
    try:
        shape = source_shape(source) or model
    except ValueError as error:
        yield f"{key}: {error}"
        return
    if task["format"] == "llama" and shape["position"] != "rope":
        yield (
            "task.format=llama: the source is of the 13B kind, whose attention has linear biases (ALiBi); a "
            "Llama has rotary positions and cannot compute it; task.format=hf or megatron would do"
        )
    if task["format"] == "megatron":
        for name, axis, degree in uneven(shape, task["tensor"], task["pipeline"]):
            yield f"task.{axis}={degree}: does not divide {name}={shape[name]} of the source"
        if shape["vocab_size"] is not None:
            padded = padded_vocabulary(shape["vocab_size"], task["vocab_divisible_by"], task["tensor"])
            if padded > 2 * shape["vocab_size"]:
                yield (
                    f"task.vocab_divisible_by={task['vocab_divisible_by']}: pads the {shape['vocab_size']} "
                    f"rows of the vocabulary to {padded}, and there are not as many to copy; less would do"
                )
    else:
        for name in ("tensor", "pipeline"):
            if task[name] != 1:
                yield f"task.{name}={task[name]}: belongs to task.format=megatron; leave the key out"


def _target(task: dict[str, Any], folder: Path) -> Iterator[str]:
    """The target is not there yet, and can be."""
    if task["target"] is None:
        yield "task.target: no value; name the folder to be made (task.target=FOLDER)"
        return
    target, key = absolute(task["target"], folder), f"task.target={task['target']}"
    if os.path.lexists(target):
        yield f"{key}: exists already; name another, or remove it"
    elif task["source"] is not None and target.is_relative_to(absolute(task["source"], folder)):
        yield f"{key}: lies inside task.source; name a folder beside it"
    above = next(parent for parent in target.parents if os.path.lexists(parent))
    if not os.path.isdir(above) or not os.access(above, os.W_OK):
        yield f"{key}: {above} is no folder that can be written to"


def source_shape(source: Path) -> dict[str, Any] | None:
    """The shape that a folder of weights tells of itself; None where only the model choice does.

    Raises ValueError for a folder that is refused.
    """
    kind = weight_kind(source)
    if kind != MEGATRON:
        told = shape_of(read_config(source))
        tensor_files(source, kind)
        return told
    if not os.path.lexists(source / MANIFEST):
        return None
    extra = read_json(source / MANIFEST).get("extra")
    shape = extra.get("shape") if isinstance(extra, dict) else None
    if not isinstance(shape, dict):
        raise ValueError(f"{source / MANIFEST}: is not what a conversion wrote")
    return shape


def uneven(shape: Mapping[str, Any], tensor: int, pipeline: int) -> list[tuple[str, str, int]]:
    """What of a model does not come out even over ModelLink's ranks and stages: (size, axis, degree)."""
    sizes = (
        ("num_heads", "tensor", tensor),
        ("intermediate_size", "tensor", tensor),
        ("num_layers", "pipeline", pipeline),
    )
    return [entry for entry in sizes if shape[entry[0]] % entry[2]]


def padded_vocabulary(vocab_size: int, divisible_by: int, tensor: int) -> int:
    """Rows of embedding and head with ModelLink's padding. At most as many are added as there are, as they
    are copies of the last ones."""
    return -(-vocab_size // (divisible_by * tensor)) * divisible_by * tensor
