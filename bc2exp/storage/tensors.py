"""A folder of tensors that cannot be read wrongly: safetensors files and a manifest with a checksum a tensor.

The manifest, `manifest.json`, lists every file with the SHA-256 of its header, and of every tensor in it the
dtype, shape and SHA-256 of its bytes; it holds a checksum of itself, too. Reading compares everything, so no
bit changes unnoticed. Nothing here is a pickle: a damaged or a hostile folder can be refused, but it cannot
run code.

One process writes a folder with `save_tensors`. Several processes write one together with the parts it is
made of: each `write_file`, one of them `write_manifest` with all entries, then `atomic.publish_folder`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bc2exp.storage import atomic

MANIFEST = "manifest.json"

_FORMAT = "bc2exp tensors 1"

FileEntry = dict[str, Any]
"""What the manifest says of one file: {"bytes": int, "header": SHA-256 of what stands before the tensors (in
checkpoints; conversions leave it out), "tensors": {name: {"dtype", "shape", "sha256"}}}."""


class DamagedCheckpoint(ValueError):
    """What is on the disk is not what was written. The message names the file and, if known, the tensor."""


def save_tensors(
    folder: str | os.PathLike[str],
    files: Mapping[str, Mapping[str, torch.Tensor]],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `files`, {file name: {tensor name: tensor}}, and `extra` (JSON) into the new folder `folder`.

    The folder appears whole or not at all: it is built in a sibling with a leading dot, brought to the disk
    and renamed. Raises FileExistsError where `folder` exists.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        entries = {name: write_file(temporary / name, tensors) for name, tensors in files.items()}
        write_manifest(temporary, entries, extra)
        atomic.publish_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> FileEntry:
    """Write one safetensors file and return its manifest entry. Tensors may be on any device, and strided."""
    # clone() only where two names share memory: safetensors refuses those, and a checkpoint may hold them.
    local: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        address = plain.untyped_storage().data_ptr()
        local[name] = plain.clone() if address in seen and plain.numel() else plain
        seen.add(address)
    save_file(local, os.fspath(path), metadata={"format": "pt"})
    described = {name: {**_kind(tensor), "sha256": checksum(tensor)} for name, tensor in local.items()}
    return {"bytes": os.path.getsize(path), "header": _header_digest(Path(path)), "tensors": described}


def write_manifest(
    folder: str | os.PathLike[str], entries: Mapping[str, FileEntry], extra: Mapping[str, Any] | None = None
) -> None:
    """Write the manifest of the files in `folder`, {file name: entry of `write_file`}, with `extra` in it."""
    # Through JSON and back, so that the checksum is of what a reader will see (keys as strings, in order).
    body = json.loads(json.dumps({"format": _FORMAT, "extra": dict(extra or {}), "files": dict(entries)}))
    atomic.write_json(Path(folder) / MANIFEST, {**body, "sha256": _digest(body)})


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of `folder`: {"extra": …, "files": {file name: entry}}.

    Raises DamagedCheckpoint where it is missing, garbled, or not what was written.
    """
    path = Path(folder) / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        digest = body.pop("sha256")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path}: the manifest cannot be read: {error}") from None
    if digest != _digest(body):
        raise DamagedCheckpoint(f"{path}: the manifest does not match its own checksum")
    if body["format"] != _FORMAT:
        raise DamagedCheckpoint(f"{path}: the format is {body['format']!r}, this program reads {_FORMAT!r}")
    return cast(dict[str, Any], body)


def load_file(
    folder: str | os.PathLike[str],
    file_name: str,
    manifest: Mapping[str, Any],
    names: Iterable[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Read the tensors `names` (all, where None) of one file onto the CPU, each compared with the manifest.

    Raises DamagedCheckpoint where the file is missing, cut short or altered, KeyError for a name that the
    manifest does not list.
    """
    path = Path(folder) / file_name
    wanted = manifest["files"][file_name]["tensors"] if names is None else names
    return dict(_read_checked(path, manifest["files"][file_name], wanted))


def _read_checked(path: Path, entry: FileEntry, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors `names` of a file one by one, compared with its entry. Raises as `load_file` does."""
    expected = entry["tensors"]
    try:
        if (size := path.stat().st_size) != entry["bytes"]:
            raise DamagedCheckpoint(f"{path}: {size} bytes, {entry['bytes']} were written")
        with safe_open(os.fspath(path), framework="pt") as file:
            if missing := sorted(set(expected) ^ set(file.keys())):
                raise DamagedCheckpoint(f"{path}: tensor {missing[0]!r} is in the manifest or the file only")
            for name in names:
                yield name, _checked(file.get_tensor(name), expected[name], f"{path}: tensor {name!r}")
        # Last, as what is wrong with a tensor says more.
        if "header" in entry and _header_digest(path) != entry["header"]:
            raise DamagedCheckpoint(f"{path}: the checksum of its header differs, the file is damaged")
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error}") from None


def load_tensors(folder: str | os.PathLike[str]) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read a whole folder: ({file name: {tensor name: tensor}}, extra). Raises DamagedCheckpoint."""
    manifest = read_manifest(folder)
    return {name: load_file(folder, name, manifest) for name in manifest["files"]}, manifest["extra"]


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read everything in `folder`, one tensor at a time, keep none of it, and return the manifest.

    Raises DamagedCheckpoint at the first thing that is wrong.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        for _ in _read_checked(Path(folder) / name, entry, entry["tensors"]):
            pass
    return manifest


def checksum(tensor: torch.Tensor) -> str:
    """SHA-256, in hex, of the bytes of a contiguous CPU tensor of any dtype."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _header_digest(path: Path) -> str:
    """SHA-256 of all that a safetensors file has before its tensors."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        return hashlib.sha256(file.read(8 + min(length, os.fstat(file.fileno()).st_size))).hexdigest()


def _kind(tensor: torch.Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _checked(tensor: torch.Tensor, expected: Mapping[str, Any], where: str) -> torch.Tensor:
    found = _kind(tensor)
    for key, value in found.items():
        if value != expected[key]:
            raise DamagedCheckpoint(f"{where}: {key} is {value}, {expected[key]} was written")
    if checksum(tensor) != expected["sha256"]:
        raise DamagedCheckpoint(f"{where}: the checksum of its bytes differs, the data are damaged")
    return tensor


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()
