"""What a checkpoint holds of a training: every weight and its two moments, into files and back.

Whole tensors, so that no layout is in them. On top of its own no rank holds more than `FILE_BYTES` and a
tensor, and what is to be written beside the training a copy of its own on the host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bc2exp.config.errors import UserError
from bc2exp.hardware.base import Backend
from bc2exp.parallel.layout import Layout
from bc2exp.parallel.shard import local
from bc2exp.storage.tensors import DamagedCheckpoint, FileEntry, load_file, read_manifest, write_file
from bc2exp.train import TrainingError

FILE_BYTES = 2 * 2**30
"""A file of a checkpoint is ended when it holds as much."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("model", *_MOMENTS)
"""What a checkpoint holds of every weight: itself and its moments, in files that begin with these words."""

Read = Callable[[str, str], torch.Tensor]
"""From a kind and a weight's name to this rank's part of it."""


def reader(layout: Layout, optimizer: torch.optim.Optimizer) -> Read:
    """The state as it is on the device."""

    def read(kind: str, name: str) -> torch.Tensor:
        parameter = layout.model.get_parameter(name)
        return local(parameter.detach() if kind == "model" else optimizer.state[parameter][kind])

    return read


class HostCopy:
    """This rank's state at a moment, in memory of the host that is taken once and used for every copy."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._tensors: dict[tuple[str, str], torch.Tensor] = {}

    def make_room(self, like: Mapping[tuple[str, str], torch.Tensor]) -> None:
        """Take the memory, which costs more than a copy and may be done beside the training."""
        for key, value in like.items():
            room = torch.empty(value.shape, dtype=value.dtype, pin_memory=self._backend.pins_memory)
            self._tensors[key] = room.fill_(0)  # the system gives what is touched

    def take(self, state: Mapping[tuple[str, str], torch.Tensor]) -> Read:
        """Copy everything; a reader of the copy, good until the next one is taken."""
        if not self._tensors:
            self.make_room(state)
        for key, value in state.items():
            self._tensors[key].copy_(value, non_blocking=True)
        self._backend.synchronize()
        return lambda kind, name: self._tensors[kind, name]


def state_of(layout: Layout, read: Read) -> dict[tuple[str, str], torch.Tensor]:
    """All of this rank's state, by kind and name. Between steps only: within one, a parameter may be another
    tensor."""
    return {(kind, name): read(kind, name) for name in layout.own_names() for kind in KINDS}


def state_bytes(layout: Layout) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(len(KINDS) * 4 * torch.Size(shape).numel() for shape in layout.parts.shapes.values())


def write_state(folder: Path, layout: Layout, read: Read) -> dict[str, FileEntry]:
    """Write the state into files of about FILE_BYTES; what the manifest says of them. Every rank must call
    it; rank 0 writes.

    Raises TrainingError for a value that is not finite: no training could go on from it.
    """
    entries: dict[str, FileEntry] = {}
    for kind in KINDS:
        entries |= _write_kind(folder, kind, layout.parts.whole(partial(read, kind)))
    return entries


def _write_kind(folder: Path, kind: str, tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, FileEntry]:
    entries: dict[str, FileEntry] = {}
    waiting: dict[str, torch.Tensor] = {}

    def flush() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{kind}-{len(entries) + 1}.safetensors" if entries else f"{kind}.safetensors"
        entries[name] = write_file(folder / name, waiting)
        waiting.clear()

    for name, tensor in tensors:
        if not all(bound.isfinite() for bound in torch.aminmax(tensor)):
            raise TrainingError(
                f"{kind}: {name} holds a value that is not finite; no checkpoint of this step was written"
            )
        waiting[name] = tensor
        if sum(tensor.nbytes for tensor in waiting.values()) >= FILE_BYTES:
            flush()
    if waiting:
        flush()
    return entries


def load_weights(layout: Layout, path: Path) -> None:
    """Give every weight of this rank its part of what is in the checkpoint `path`, and leave its moments.

    Raises UserError where it is damaged or of another model.
    """
    try:
        manifest = read_manifest(path)
        files = _files_of_model(layout, path, manifest)
        for name in layout.own_names():
            layout.assign(name, load_file(path, files[name], manifest, [name])[name])
    except DamagedCheckpoint as error:
        raise UserError(str(error)) from None


def fill(
    layout: Layout, optimizer: torch.optim.Optimizer, path: Path, manifest: dict[str, Any], step: int
) -> None:
    """Give every weight and moment of this rank its part of what is in the checkpoint `path` of a step.

    Raises UserError where it is of another model, and DamagedCheckpoint.
    """
    files = {kind: _files(manifest, kind) for kind in KINDS}
    files["model"] = _files_of_model(layout, path, manifest)
    for name in layout.own_names():
        parameter = layout.model.get_parameter(name)
        state = optimizer.state[parameter]
        state["step"].fill_(step)
        for kind in KINDS:
            target = local(parameter.detach() if kind == "model" else state[kind])
            # read, copied and dropped in one line: no two whole tensors at a time
            target.copy_(layout.parts.mine(name, load_file(path, files[kind][name], manifest, [name])[name]))


def _files_of_model(layout: Layout, path: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """The file of each weight, where the checkpoint is of this model."""
    files = _files(manifest, "model")
    shapes = {name: tuple(manifest["files"][file]["tensors"][name]["shape"]) for name, file in files.items()}
    wanted = layout.parts.shapes
    wrong = sorted(set(shapes) ^ set(wanted)) or [name for name in wanted if shapes[name] != wanted[name]]
    if wrong:
        raise UserError(f"{path}: is of another model: {wrong[0]} and {len(wrong) - 1} more differ")
    return files


def _files(manifest: dict[str, Any], kind: str) -> dict[str, str]:
    """The file that holds each tensor of a kind."""
    names = [name for name in manifest["files"] if re.fullmatch(rf"{kind}(-\d+)?\.safetensors", name)]
    return {tensor: name for name in names for tensor in manifest["files"][name]["tensors"]}
