"""Checkpoints: everything an exact continuation needs, in safetensors and JSON.

What needs no saving: the order of samples (a function of the seed and the samples consumed), the learning
rate (a function of the step), and the state of random generators (no operation of training draws from one).

A checkpoint holds whole tensors, so it knows no layout: saved in one, it loads into any other, bit for bit.
Rank 0 writes, every rank reads its parts. On top of its own no rank holds more than
`FILE_BYTES` and a tensor.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bc2exp.config.errors import UserError
from bc2exp.parallel.layout import Layout
from bc2exp.parallel.shard import local
from bc2exp.parallel.world import World
from bc2exp.storage import atomic
from bc2exp.storage.tensors import (
    DamagedCheckpoint,
    FileEntry,
    load_file,
    read_manifest,
    verify,
    write_file,
    write_manifest,
)

FILE_BYTES = 2 * 2**30
"""A file of a checkpoint is ended when it holds as much."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_KINDS = ("model", *_MOMENTS)
"""What a checkpoint holds of every weight: itself and its moments, in files that begin with these words."""
_NAME = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True)
class Progress:
    """How far a training is: optimizer steps done, samples consumed."""

    step: int
    samples: int


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds one folder a checkpoint, `step-00000040`.
        keep: how many of the newest stay.
        world: the ranks of the run; rank 0 writes.
        tell: gets a sentence when a damaged checkpoint is passed over.
    """

    folder: Path
    keep: int
    world: World
    tell: Callable[[str], None]

    def save(self, layout: Layout, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Write a checkpoint; whole or not at all. Every rank must call it. Returns its folder."""
        path = self.folder / f"step-{progress.step:08d}"
        if self.world.rank == 0:
            self._clear(progress.step)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        entries: dict[str, FileEntry] = {}
        try:
            for kind in _KINDS:
                entries |= _write(temporary, kind, layout.parts.whole(_reader(layout, optimizer, kind)))
            if self.world.rank == 0:
                write_manifest(temporary, entries, {"step": progress.step, "samples": progress.samples})
                atomic.publish_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self.world.rank == 0:
            for old in self.list()[: -self.keep]:
                shutil.rmtree(old)
        return path

    def _clear(self, step: int) -> None:
        """Remove what a killed save left half built, and checkpoints that are not behind `step`: the run
        went on from an earlier one because they are damaged, and they must not count as the newest."""
        half_built = list(self.folder.glob(".step-*"))
        passed_over = [path for path in self.list() if _step_of(path) >= step]
        for path in half_built + passed_over:
            shutil.rmtree(path)

    def list(self) -> list[Path]:
        """Folders of whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.match(path.name))

    def load_newest(self, layout: Layout, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Continue from the newest checkpoint whose checksums hold; None where there is none.

        Rank 0 looks for it. Raises UserError, on every rank, where checkpoints exist and every one is
        damaged, or it is of another model, or not every rank finds the same.
        """
        path, problems = self._newest_whole() if self.world.rank == 0 else (None, ())
        path, problems = self.world.gather((path, problems))[0]
        if path is None:
            if problems:
                raise UserError(f"{self.folder}: no checkpoint is whole: {'; '.join(problems)}")
            return None
        path = self.folder / path
        try:
            manifest = read_manifest(path)
        except DamagedCheckpoint:
            manifest = {}
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        if len(set(self.world.gather(digest))) > 1:
            raise UserError(f"{self.folder}: not every rank finds the same checkpoints there")
        _fill(layout, optimizer, path, manifest)
        return Progress(int(manifest["extra"]["step"]), int(manifest["extra"]["samples"]))

    def _newest_whole(self) -> tuple[str | None, Sequence[str]]:
        """The name of the newest checkpoint that is as it was written, and what is wrong with newer ones."""
        problems: Sequence[str] = ()
        for path in reversed(self.list()):
            try:
                verify(path)
                return path.name, problems
            except DamagedCheckpoint as error:
                problems = (*problems, str(error))
                self.tell(f"checkpoint passed over: {error}")
        return None, problems


def _reader(layout: Layout, optimizer: torch.optim.Optimizer, kind: str) -> Callable[[str], torch.Tensor]:
    """A function from a weight's name to this rank's part of it, or of its moment."""

    def read(name: str) -> torch.Tensor:
        parameter = layout.model.get_parameter(name)
        return local(parameter.detach() if kind == "model" else optimizer.state[parameter][kind])

    return read


def _write(folder: Path, kind: str, tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, FileEntry]:
    """Write the tensors that come, into files of about FILE_BYTES; what the manifest says of these."""
    entries: dict[str, FileEntry] = {}
    waiting: dict[str, torch.Tensor] = {}

    def flush() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{kind}-{len(entries) + 1}.safetensors" if entries else f"{kind}.safetensors"
        entries[name] = write_file(folder / name, waiting)
        waiting.clear()

    for name, tensor in tensors:
        waiting[name] = tensor.cpu()
        if sum(tensor.nbytes for tensor in waiting.values()) >= FILE_BYTES:
            flush()
    if waiting:
        flush()
    return entries


def _fill(layout: Layout, optimizer: torch.optim.Optimizer, path: Path, manifest: dict[str, Any]) -> None:
    """Give every weight and moment of this rank its part of what is in the checkpoint."""
    files = {kind: _files(manifest, kind) for kind in _KINDS}
    shapes = {
        name: tuple(manifest["files"][file]["tensors"][name]["shape"])
        for name, file in files["model"].items()
    }
    wanted = layout.parts.shapes
    wrong = sorted(set(shapes) ^ set(wanted)) or [name for name in wanted if shapes[name] != wanted[name]]
    if wrong:
        raise UserError(f"{path}: is of another model: {wrong[0]} and {len(wrong) - 1} more differ")
    step = torch.tensor(float(_step_of(path)), dtype=torch.float32)
    for name in layout.own_names():
        parameter = layout.model.get_parameter(name)
        state = optimizer.state[parameter]
        state["step"] = step.clone().to(parameter.device)
        for kind in _KINDS:
            if kind != "model":
                state[kind] = torch.zeros_like(parameter)
            target = local(parameter.detach() if kind == "model" else state[kind])
            # read, copied and dropped in one line: no two whole tensors at a time
            target.copy_(layout.parts.mine(name, load_file(path, files[kind][name], manifest, [name])[name]))


def _files(manifest: dict[str, Any], kind: str) -> dict[str, str]:
    """The file that holds each tensor of a kind."""
    names = [name for name in manifest["files"] if re.fullmatch(rf"{kind}(-\d+)?\.safetensors", name)]
    return {tensor: name for name in names for tensor in manifest["files"][name]["tensors"]}


def _step_of(path: Path) -> int:
    match = _NAME.match(path.name)
    assert match is not None, path
    return int(match[1])
