"""Folders in the published (Hugging Face) layout: config.json, safetensors shards and their index.

Read and written tensor by tensor; nothing is ever unpickled. Names and fields: `hf_layout`.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bc2exp.hardware import get_backend
from bc2exp.hardware.base import Ops
from bc2exp.model.baichuan2 import Baichuan2
from bc2exp.storage import atomic
from bc2exp.weights import hf_layout

INDEX = "model.safetensors.index.json"

Assign = Callable[[str, nn.Parameter, Tensor], None]
"""Puts a whole tensor into the parameter of that name; a sharded model takes its part of it."""


def load_hf(folder: Path | str, dtype: torch.dtype = torch.float32, ops: Ops | None = None) -> nn.Module:
    """The model in `folder`, on the CPU, its weights in `dtype`; `ops` default to the CPU's.

    Raises ValueError as `load_hf_into` does.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = Baichuan2(**read_shape(folder), ops=ops or get_backend("cpu").ops)
    model.to(dtype).to_empty(device="cpu")
    load_hf_into(model, folder)
    return model


def load_hf_into(
    model: nn.Module,
    folder: Path | str,
    *,
    assign: Assign | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Fill the parameters of `model`, which may be a stage of a pipeline, with the weights in `folder`.

    By default each parameter is copied into, in its own type and on its own device; for parameters that
    hold only a part of their tensor give `assign`, and the whole shapes by name.

    Raises ValueError for a folder that is not a Baichuan2 in safetensors, whose tensors are not those its
    config.json calls for, or do not fit the model: one error that names every tensor concerned.
    """
    folder = Path(folder)
    expected = hf_layout.published_shapes(read_shape(folder))
    files, found = _read_headers(folder)
    problems = _differences(found, expected)
    for name, parameter in model.named_parameters():
        theirs, third = hf_layout.published_name(name)
        wanted = tuple(parameter.shape) if shapes is None else shapes[name]
        whole = wanted if third is None else (3 * wanted[0], *wanted[1:])
        if expected.get(theirs) != whole:
            problems.append(f"the model's {name} {wanted} has no match in a folder of this config.json")
    if problems:
        raise ValueError(f"{folder} does not hold this model: {'; '.join(problems)}")
    for name, parameter in model.named_parameters():
        theirs, third = hf_layout.published_name(name)
        with safe_open(files[theirs], "pt") as file:
            if third is None:
                tensor = file.get_tensor(theirs)
            else:
                rows = expected[theirs][0] // 3
                tensor = file.get_slice(theirs)[third * rows : (third + 1) * rows]
        (assign or _copy)(name, parameter, tensor)
        del tensor  # before the next is read: a rank may have room for its parts and little else


def read_shape(folder: Path | str) -> dict[str, Any]:
    """The shape of the model in `folder`, as keyword arguments of `Baichuan2`.

    Raises ValueError where config.json is missing, no JSON, or not of a Baichuan2.
    """
    return hf_layout.from_config(_read_json(Path(folder) / "config.json"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: not a folder of published weights") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def save_hf(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: Path | str,
    *,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    tokenizer: Path | str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model's parameters as `folder`, in the published layout.

    `tensors` are named as in the model; an iterable is drained one by one, and no more than a shard and
    a layer's unfinished W_pack is held. `config`: see `hf_layout.to_config`. `tokenizer` is the
    SentencePiece file, copied as tokenizer.model.

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
        written = _write_shards(pairs, temporary, dtype, max_shard_bytes)
        problems = _differences(written, hf_layout.published_shapes(config))
        if problems:
            raise ValueError(f"these tensors are not of a model of this shape: {'; '.join(problems)}")
        atomic.write_json(temporary / "config.json", hf_layout.to_config(config, dtype))
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / "tokenizer.model")
        atomic.publish_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _copy(name: str, parameter: nn.Parameter, tensor: Tensor) -> None:
    parameter.detach().copy_(tensor)


def _differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with the tensors found, by name; empty if nothing is."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of a wrong shape": misshapen}
    return [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]


def _read_headers(folder: Path) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    """The file and the shape of every tensor in `folder`."""
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _shard_paths(folder):
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                for name in names:
                    if not hf_layout.is_derived(name):
                        files[name] = path
                        shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    return files, shapes


def _shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or without an index all."""
    if (folder / INDEX).exists():
        weight_map = _read_json(folder / INDEX).get("weight_map", {})
        return [folder / name for name in sorted(set(weight_map.values()))]
    paths = sorted(folder.glob("*.safetensors"))
    if not paths and any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} holds pickled weights (*.bin), which can run code when they are loaded: "
            "convert them to safetensors first"
        )
    if not paths:
        raise ValueError(f"{folder} holds no safetensors")
    return paths


def _write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, tuple[int, ...]]:
    """Write the shards and their index; returns the shape of every tensor written."""
    shapes: dict[str, tuple[int, ...]] = {}
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(_packed(tensors), dtype, max_shard_bytes):
        shards.append(list(shard))
        shapes |= {name: tuple(tensor.shape) for name, tensor in shard.items()}
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        # The names say how many shards there are, which is known only now.
        path = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / path)
        weight_map |= dict.fromkeys(names, path)
    atomic.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return shapes


def _shards(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Groups of tensors on the CPU in `dtype`, each of at most `max_shard_bytes` or a single tensor."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _packed(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors under their published names, each W_pack once its three parts have come."""
    unfinished: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors:
        theirs, third = hf_layout.published_name(name)
        if third is None:
            yield theirs, tensor
            continue
        parts = unfinished.setdefault(theirs, {})
        parts[third] = tensor
        if len(parts) == len(hf_layout.PACKED):
            del unfinished[theirs]
            yield theirs, torch.cat([parts[part] for part in sorted(parts)])
