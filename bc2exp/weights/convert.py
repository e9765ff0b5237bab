"""From one layout of weights to another, piece by piece: mapped input, fsynced output, a name at the end.

The target is built in `.<name>.partial` beside it and takes its name when all of it is on the disk, with a
manifest of checksums in it: after a kill it is absent or whole. A lock keeps two conversions apart; what a
killed one left is removed by the next.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bc2exp.config.errors import UserError
from bc2exp.model.loss import NORM_EPS
from bc2exp.storage import atomic, lock
from bc2exp.storage.tensors import FileEntry, write_manifest
from bc2exp.weights.layout import Part, Weights, stored_shape
from bc2exp.weights.targets import Target, Writer
from bc2exp.weights.writing import Flusher, Pieces, bytes_of

_INTEGERS = {2: torch.int16, 4: torch.int32}
_SPARE_BYTES = 64 * 2**20
"""For everything that is no tensor."""


class Progress(NamedTuple):
    """How far a conversion is: what it does ("convert" or "verify"), bytes of the target, the tensor."""

    stage: str
    bytes_done: int
    bytes_total: int
    tensor: str


OnProgress = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """Forget it."""


@dataclass(frozen=True)
class Converted:
    """What a conversion came to.

    Attributes:
        files, tensors, bytes: of weights, in the target.
        dtypes: of the tensors, by how many have each.
        nan: tensors with at least one value that is not a number.
        convert_s, verify_s: seconds; None: not verified.
    """

    files: int
    tensors: int
    bytes: int
    dtypes: dict[str, int]
    nan: list[str]
    convert_s: float
    verify_s: float | None


def convert(
    source: Weights,
    target: Path,
    form: Target,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    beside: Mapping[str, bytes] | None = None,
    about: Mapping[str, Any] | None = None,
    progress: OnProgress = ignore_progress,
) -> Converted:
    """Write `source` as the new folder `target`.

    Args:
        source: opened weights.
        target: appears whole or not at all.
        form: the layout of the target.
        dtype: of every tensor; None: as in the source.
        verify: read the target back from the disk and compare each bit before it gets its name.
        beside: further files of the target and their content.
        about: what the manifest is to say beside the shape of the model.
        progress: is told after every piece.

    Raises:
        UserError: the target exists, is being written by another process, or does not fit on the disk.
        OSError: the disk does not do as it is told. Nothing is left then.
    """
    partial, name = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.lock")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        owner = lock.hold(name)
    except lock.LockHeld:
        raise UserError(f"task.target={target}: another process is writing it") from None
    with owner:
        if os.path.lexists(target):
            raise UserError(f"task.target={target}: exists already; name another, or remove it")
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
            work = _Work(source, form, dtype, progress)
            work.require_space(target)
            done = work.write(partial, beside or {}, about or {}, verify=verify)
            atomic.publish_folder(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            name.unlink(missing_ok=True)
    return done


class _Work:
    """One conversion under way."""

    def __init__(
        self, source: Weights, form: Target, dtype: torch.dtype | None, progress: OnProgress
    ) -> None:
        self._source, self._form, self._progress = source, form, progress
        self._plans = form.plans(source.shape)
        self._headers = {
            file: {key: (dtype or self._dtype(parts), stored_shape(parts)) for key, parts in plan.items()}
            for file, plan in self._plans.items()
        }
        kinds = [entry for header in self._headers.values() for entry in header.values()]
        self._total = sum(kind.itemsize * _count(shape) for kind, shape in kinds)
        self._dtypes = {
            str(kind).removeprefix("torch."): sum(other == kind for other, _ in kinds) for kind, _ in kinds
        }
        self._bytes = 0
        self._nan: list[str] = []

    def _dtype(self, parts: tuple[Part, ...]) -> torch.dtype:
        return reduce(torch.promote_types, {self._source.dtype(part.name) for part in parts})

    def require_space(self, target: Path) -> None:
        """Raise UserError where the disk is too full."""
        free, needed = shutil.disk_usage(target.parent).free, self._total + _SPARE_BYTES
        if free < needed:
            raise UserError(
                f"task.target={target}: needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} are free there"
            )

    def write(
        self, folder: Path, beside: Mapping[str, bytes], about: Mapping[str, Any], *, verify: bool
    ) -> Converted:
        """Write everything into `folder`."""
        begin = time.monotonic()
        folder.mkdir()
        flusher = Flusher()
        try:
            entries = self._write_plans(folder, flusher)
        finally:
            flusher.close()
        source = {**self._source.shape, "max_positions": self._source.max_positions}
        most = max(self._dtypes, key=self._dtypes.__getitem__)
        extra = self._form.beside(source, getattr(torch, most))
        for name, content in {**extra, **beside}.items():
            atomic.write_bytes(folder / name, content)
        write_manifest(folder, entries, {"shape": source, **about})
        middle = time.monotonic()
        if verify:
            self._verify(folder)
        return Converted(
            files=len(entries),
            tensors=sum(len(plan) for plan in self._plans.values()),
            bytes=self._total,
            dtypes=self._dtypes,
            nan=self._nan,
            convert_s=middle - begin,
            verify_s=time.monotonic() - middle if verify else None,
        )

    def _write_plans(self, folder: Path, flusher: Flusher) -> dict[str, FileEntry]:
        """Write every tensor; what the manifest says of the files.

        All targets of a piece of the source are written together: it comes from the disk once.
        """
        places = {name: number for number, name in enumerate(self._source.shapes)}
        order = [
            (places[parts[0].name], file, key)
            for file, plan in self._plans.items()
            for key, parts in plan.items()
        ]
        sums: dict[str, dict[str, Any]] = {file: {} for file in self._plans}
        writers: dict[str, Writer] = {}
        try:
            for file, header in self._headers.items():
                writers[file] = self._form.writer(folder, file, header, flusher)
            with Pieces() as pieces:
                for _, file, key in sorted(order, key=lambda entry: entry[0]):
                    sums[file][key] = self._write_tensor(writers[file], file, key, pieces)
            for writer in writers.values():
                writer.finish()
        finally:
            for writer in writers.values():
                writer.close()
        entries: dict[str, FileEntry] = {}
        for file, writer in writers.items():
            for key, name in writer.files.items():
                entry = entries.setdefault(name, {"bytes": (folder / name).stat().st_size, "tensors": {}})
                entry["tensors"][key] = self._described(file, key, sums[file][key].hexdigest())
        return entries

    def _described(self, file: str, key: str, checksum: str) -> dict[str, Any]:
        """What the manifest says of a stored tensor."""
        dtype, shape = self._headers[file][key]
        return {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "sha256": checksum}

    def _write_tensor(self, writer: Writer, file: str, key: str, pieces: Pieces) -> Any:
        """Read one stored tensor and have it written; its checksum, once `pieces` are done."""
        dtype, _ = self._headers[file][key]
        checksum, clean = hashlib.sha256(), True
        for row, values in self._values(self._plans[file][key], dtype):
            # the largest of values among which is a NaN is NaN
            clean = clean and not bool(values.amax().isnan())
            pieces.take(partial(checksum.update, bytes_of(values)), partial(writer.put, key, values, row))
            self._tell("convert", file, key, values.nbytes)
        if not clean:
            self._nan.append(f"{file}/{key}".lstrip("/"))
        return checksum

    def _values(self, parts: tuple[Part, ...], dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """A stored tensor in contiguous pieces, each with its first row."""
        row = 0
        for part in parts:
            width = 1 if part.columns is None else part.columns[1] - part.columns[0]
            for piece in part.chunks(width * 4):
                values = self._source.read(piece.name, *_slices(piece))
                if piece.unit:
                    values = F.normalize(values.float(), dim=-1, eps=NORM_EPS)
                yield row, values.to(dtype).contiguous()
                row += piece.num_rows

    def _verify(self, folder: Path) -> None:
        """Read everything again, from the disk, and compare; RuntimeError where a bit differs."""
        self._bytes = 0
        written = self._form.read(folder, self._source.shape)
        for file, plan in self._plans.items():
            for key, parts in plan.items():
                stored = written[file][key]
                for row, values in self._values(parts, self._headers[file][key][0]):
                    again = stored[row : row + values.shape[0]]
                    bits = _INTEGERS[values.dtype.itemsize]  # NaN is not equal to itself, its bits are
                    if not torch.equal(again.view(bits), values.view(bits)):
                        raise RuntimeError(f"{folder / file}: {key} is not what was written")
                    self._tell("verify", file, key, values.nbytes)

    def _tell(self, stage: str, file: str, key: str, num_bytes: int) -> None:
        self._bytes += num_bytes
        self._progress(Progress(stage, self._bytes, self._total, f"{file}/{key}".lstrip("/")))


def _slices(part: Part) -> tuple[slice, ...]:
    rows = slice(*part.rows)
    return (rows,) if part.columns is None else (rows, slice(*part.columns))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
