"""Checkpoints: everything an exact continuation needs, in safetensors and JSON.

What needs no saving: the order of samples (a function of the seed and the samples consumed), the learning
rate (a function of the step), and the state of random generators (no operation of training draws from one).

A checkpoint holds whole tensors, so it knows no layout: saved in one, it loads into any other, bit for bit.
Rank 0 writes, every rank reads its parts. A checkpoint may be written beside the training, which then waits
for a copy of the state on the host alone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bc2exp.config.errors import UserError
from bc2exp.parallel.layout import Layout
from bc2exp.parallel.world import World
from bc2exp.storage import atomic
from bc2exp.storage.tensors import DamagedCheckpoint, read_manifest, verify, write_manifest
from bc2exp.train.state import HostCopy, Read, fill, reader, state_bytes, state_of, write_state

_NAME = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True)
class Best:
    """The evaluation so far in which the metric was lowest: after which step, and its value."""

    step: int
    value: float


@dataclass(frozen=True)
class Progress:
    """How far a training is: optimizer steps done, samples consumed, and the best step where one is kept."""

    step: int
    samples: int
    best: Best | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on the disk: of which step, where, and which older ones went for it."""

    step: int
    path: Path
    removed: tuple[Path, ...]


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds one folder a checkpoint, `step-00000040`.
        keep: how many of the newest stay; the best one stays, too.
        world: the ranks of the run; rank 0 writes.
        tell: gets a sentence when a damaged checkpoint is passed over.
        origin: what the order of the samples depends on, by the names that a person knows: kept with every
            checkpoint, and compared where one is loaded.
        accept_changes: go on though `origin` is another.
    """

    folder: Path
    keep: int
    world: World
    tell: Callable[[str], None]
    origin: Mapping[str, Any] = field(default_factory=dict)
    accept_changes: bool = False

    def __post_init__(self) -> None:
        self._copy = HostCopy(self.world.backend)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[Saved | None] | None = None
        self._room: Future[None] | None = None

    def make_room(self, layout: Layout, optimizer: torch.optim.Optimizer) -> None:
        """Take the memory for copies now, beside the training, and not when the first one is taken.

        For when the optimizer has moments.
        """
        like = state_of(layout, reader(layout, optimizer))
        self._room = self._thread.submit(self._copy.make_room, like)

    def save(
        self, layout: Layout, optimizer: torch.optim.Optimizer, progress: Progress, *, beside: bool = False
    ) -> None:
        """Write a checkpoint; whole or not at all. Every rank must call it.

        `beside`: return when the state is copied; a thread writes the copy. Whatever goes wrong in it is
        raised by the next call of `finished` or `save`. Whoever calls asks `finished` what has become of it.

        Raises OSError as the disk does, and TrainingError where the state is not finite; older checkpoints
        stay.
        """
        assert self._saving is None, "ask first what has become of the checkpoint before"
        _ = self.world.host_group  # made here, where all ranks are
        read = reader(layout, optimizer)
        if beside:
            if self._room is not None:
                self._room.result()
            read = self._copy.take(state_of(layout, read))
        self._saving = self._thread.submit(self._write, layout, read, progress)

    def finished(self, *, wait: bool = False) -> Saved | None:
        """The checkpoint that was being written, once it is done; None while it is not, or where none was.

        `wait` until it is done. Raises what its writing raised.
        """
        if self._saving is None or not (wait or self._saving.done()):
            return None
        saving, self._saving = self._saving, None
        return saving.result()

    def _write(self, layout: Layout, read: Read, progress: Progress) -> Saved | None:
        path = self.folder / f"step-{progress.step:08d}"
        temporary = _hidden(path)
        if self.world.rank == 0:
            self._clear(progress.step)
            self._require_room(path, state_bytes(layout))
        try:
            entries = write_state(temporary, layout, read)
            if self.world.rank == 0:
                write_manifest(temporary, entries, {**asdict(progress), "origin": dict(self.origin)})
                atomic.publish_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return self._make_way(path, progress.best) if self.world.rank == 0 else None

    def _clear(self, step: int) -> None:
        """Remove what a killed save left half built, and checkpoints that are not behind `step`: the run
        went on from an earlier one because they are damaged, and they must not count as the newest."""
        for half_built in self.folder.glob(".step-*"):
            shutil.rmtree(half_built)
        for passed_over in self.list():
            if _step_of(passed_over) >= step:
                _remove(passed_over)

    def _require_room(self, path: Path, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: a checkpoint needs {needed / 2**30:.2f} GiB, and "
                f"{free / 2**30:.2f} are free",
                str(path),
            )

    def _make_way(self, path: Path, best: Best | None) -> Saved | None:
        """Remove what is not to be kept, once the new one can be read again; None where it cannot."""
        kept = {_step_of(old) for old in self.list()[-self.keep :]} | ({best.step} if best else set())
        old = tuple(each for each in self.list() if _step_of(each) not in kept)
        if old:
            try:
                verify(path)
            except DamagedCheckpoint as error:  # the older ones are the last that are whole
                _remove(path)
                self.tell(f"the checkpoint just written is damaged and was removed: {error}")
                return None
        for each in old:
            _remove(each)
        return Saved(_step_of(path), path, old)

    def list(self) -> list[Path]:
        """Folders of whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.match(path.name))

    def load_newest(self, layout: Layout, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Continue from the newest checkpoint whose checksums hold; None where there is none.

        Rank 0 looks for it. Raises UserError, on every rank, where checkpoints exist and every one is
        damaged, or it is of another model or another `origin`, or not every rank finds the same.
        """
        path, problems = self._newest_whole() if self.world.rank == 0 else (None, ())
        path, problems = self.world.gather((path, problems))[0]
        if path is None:
            if problems:
                raise UserError(f"{self.folder}: no checkpoint is whole: {'; '.join(problems)}")
            return None
        return self._load(layout, optimizer, self.folder / path)

    def load_step(self, layout: Layout, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Take weights and moments from the checkpoint of a step.

        Raises UserError, on every rank, where it is not there or is damaged.
        """
        path = self.folder / f"step-{step:08d}"
        problem = None
        if self.world.rank == 0:
            try:
                verify(path)
            except (DamagedCheckpoint, OSError) as error:
                problem = str(error)
        problem = self.world.gather(problem)[0]
        if problem:
            raise UserError(f"{path}: is not whole: {problem}")
        self._load(layout, optimizer, path)

    def _load(self, layout: Layout, optimizer: torch.optim.Optimizer, path: Path) -> Progress:
        try:
            manifest = read_manifest(path)
        except DamagedCheckpoint:
            manifest = {}
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        if len(set(self.world.gather(digest))) > 1:
            raise UserError(f"{self.folder}: not every rank finds the same checkpoints there")
        extra = manifest["extra"]
        self._compare_origin(path, extra.get("origin", {}))
        fill(layout, optimizer, path, manifest, _step_of(path))
        best = extra.get("best")
        return Progress(int(extra["step"]), int(extra["samples"]), Best(**best) if best else None)

    def _compare_origin(self, path: Path, there: Mapping[str, Any]) -> None:
        """Refuse, or tell, what has changed since the checkpoint was made."""
        changed = [
            f"{name} was {there[name]} and is {value}"
            for name, value in self.origin.items()
            if name in there and there[name] != value
        ]
        if not changed:
            return
        text = f"{path}: {', '.join(changed)}"
        if not self.accept_changes:
            raise UserError(
                f"{text}; with other samples this is not the same training: put them back, or go on all the "
                "same with task.accept_changes=true"
            )
        self.tell(f"going on with changes: {text}")

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


def _hidden(path: Path) -> Path:
    """A name beside `path` under which nobody takes it for a checkpoint."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill in the middle leaves none that has lost a part."""
    hidden = _hidden(path)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _step_of(path: Path) -> int:
    match = _NAME.match(path.name)
    assert match is not None, path
    return int(match[1])
