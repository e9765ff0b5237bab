"""Files that hold tensors, opened without trust: safetensors, and torch's zip files.

What is opened is mapped: tensors come into memory when they are read, page by page, and go again. A file is
believed in nothing that it can be asked for: sizes, places and types are compared with the file itself.
"""

from __future__ import annotations

import argparse
import math
import mmap
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bc2exp.config.weight_files import parse_json

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that weights have, by their names in a safetensors file."""
_MAX_HEADER_BYTES = 100_000_000
_MAX_PICKLE_BYTES = 64 * 2**20


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped; by name.

    Raises ValueError where the header is no header, or claims tensors that overlap, leave holes, are of a
    type that weights do not have, or are not as long as they should be.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} cannot be read: its header claims {length:,} bytes, the file has {size:,}"
            )
        try:
            header = parse_json(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: its header is no JSON: {error}") from None
        if not isinstance(header, dict):
            raise ValueError(f"{path} cannot be read: its header is no JSON object")
        header.pop("__metadata__", None)
        _check_places(path, header, size - 8 - length)
        if size == 8 + length:
            return {}
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for name, entry in header.items():
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        with warnings.catch_warnings():  # that the tensor must not be written to: nobody does
            warnings.simplefilter("ignore", UserWarning)
            count, offset = math.prod(entry["shape"]), 8 + length + entry["data_offsets"][0]
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def _check_places(path: Path, header: Mapping[str, Any], num_bytes: int) -> None:
    """Every tensor has a known type, as many bytes as its shape says, and all together fill the file."""
    places = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise ValueError(f"{path} cannot be read: its header says nothing sensible of {name}")
        if dtype not in SAFETENSORS_DTYPES:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise ValueError(f"{path}: {name} is of type {dtype}; weights are of {known}")
        if not all(type(dim) is int and 0 < dim < 2**48 for dim in shape) or len(shape) > 8:
            raise ValueError(f"{path}: {name} has the impossible shape {shape}")
        expected = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
        if end - begin != expected:
            raise ValueError(f"{path}: {name} has {end - begin:,} bytes, its shape asks for {expected:,}")
        places.append((begin, end, name))
    last = 0
    for begin, end, name in sorted(places):
        if begin != last:
            what = "overlaps the tensor before it" if begin < last else "lies behind bytes of no tensor"
            raise ValueError(f"{path} cannot be read: {name} {what}")
        last = end
    if last != num_bytes:
        raise ValueError(f"{path} cannot be read: its tensors have {last:,} bytes, the file {num_bytes:,}")


class _Skipped:
    """Stands in for classes and functions of numpy in a training checkpoint: what they would have made is
    not made, and what is said to them is forgotten."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# numpy's random state, which training checkpoints hold. Nothing of numpy is called: these names only stop
# being a reason to refuse the file.
_SKIPPED = [
    "_codecs.encode",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
]


def open_torch(path: Path, *, training: bool = False) -> Any:
    """What a file of torch.save holds, its tensors mapped; no code of it is run.

    torch's own weights-only reader reads it, which makes tensors and plain containers and refuses everything
    else. With `training` it admits `argparse.Namespace`, as Megatron's checkpoints hold their arguments in
    one, and passes over numpy's random state.

    Raises ValueError where it is of torch's old format, or holds anything else.
    """
    _check_zip(path)
    admitted: list[Any] = [argparse.Namespace, *((_Skipped, name) for name in _SKIPPED)] if training else []
    try:
        with torch.serialization.safe_globals(admitted):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # whatever a file that was made to be odd brings up
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(f"{path}: holds {refused[1]}, which is not weights; it was not loaded") from None
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read: {text}") from None


def _check_zip(path: Path) -> None:
    """The file is a zip whose members lie in it as they are: nothing grows when it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile):
        raise ValueError(
            f"{path} cannot be read: is no zip file; torch wrote another format before 1.6, and a newer "
            "torch.save of what it holds makes one"
        ) from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(
                f"{path} cannot be read: {member.filename} is compressed, which torch never does"
            )
        if member.filename.endswith(".pkl") and member.file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"{path} cannot be read: {member.filename} has {member.file_size:,} bytes")


def plain_tensors(values: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """`values` as tensors by name.

    Raises ValueError, naming it, for one that is no plain tensor of a type that weights have.
    """
    tensors = {}
    for name, value in values.items():
        if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter):
            raise ValueError(f"{path}: {name} is {type(value).__name__}, not a tensor")
        value = value.detach()
        if value.layout != torch.strided or value.device.type != "cpu" or not value.is_contiguous():
            raise ValueError(f"{path}: {name} is no plain tensor ({value.layout}, {value.device})")
        if value.dtype not in SAFETENSORS_DTYPES.values():
            kind, known = str(value.dtype).removeprefix("torch."), "float32, float16, bfloat16"
            raise ValueError(f"{path}: {name} is of type {kind}; weights are of {known}")
        tensors[name] = value
    return tensors
