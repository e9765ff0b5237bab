"""Safetensors written as they come: the header first, as shapes are known, then tensors in any order.

Nothing is held but the piece in hand. What is written goes to the disk while the next piece is computed, and
out of the page cache when it is there: neither memory nor the cache fills up with it.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from bc2exp.storage import atomic
from bc2exp.weights.containers import SAFETENSORS_DTYPES

MAX_SHARD_BYTES = 5 * 10**9
"""A file is ended before it would hold more, or with its first tensor."""
_FLUSH_BYTES = 128 * 2**20
_PIECES = 3
"""Pieces in memory, beside the one that is being read."""
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

Header = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of every tensor, by name, in the order of writing."""


class Flusher:
    """Brings files to the disk beside whoever writes them."""

    def __init__(self) -> None:
        # a short queue: whoever writes faster than the disk waits for it
        self._queue: queue.Queue[int | None] = queue.Queue(maxsize=2)
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def flush(self, descriptor: int) -> None:
        """Have what was written so far brought to the disk; the descriptor is the flusher's then.

        Raises OSError where that failed for an earlier one.
        """
        self._queue.put(descriptor)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait for all of it. Raises OSError where any of it failed."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (descriptor := self._queue.get()) is not None:
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                self._error = self._error or error
            finally:
                os.close(descriptor)


class Pieces:
    """Checks and writes pieces beside whoever reads them: each is one after the other, and both at a time.

    Most tensors of a rank are a piece of their own, so that whoever waited at the end of each tensor would
    read and write in turn.
    """

    def __init__(self) -> None:
        self._checking, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._begun: deque[Future[None]] = deque()

    def take(self, check: Callable[[], None], write: Callable[[], None]) -> None:
        """Begin a piece. Waits for those before it, but for `_PIECES`; raises what they raised."""
        self._begun += (self._checking.submit(check), self._writing.submit(write))
        while len(self._begun) > 2 * _PIECES:
            self._begun.popleft().result()

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for all. Raises what a piece raised, unless there is an error already."""
        for executor in (self._checking, self._writing):
            executor.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for done in self._begun:
                done.result()


class OpenFile:
    """A file that is written here and there, and brought to the disk on the way. It exists."""

    def __init__(self, path: Path, flusher: Flusher) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._flusher, self._unflushed = flusher, 0

    def write(self, data: memoryview | bytes, at: int) -> None:
        """Write all of `data` at a place of the file."""
        data = memoryview(data)
        self._unflushed += len(data)
        while data:  # the system may write less than it is asked to
            written = os.pwrite(self._descriptor, data, at)
            data, at = data[written:], at + written
        if self._unflushed >= _FLUSH_BYTES:
            self._unflushed = 0
            self._flusher.flush(os.dup(self._descriptor))

    def close(self) -> None:
        """Bring the rest to the disk and close the file."""
        self._flusher.flush(self._descriptor)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU; of its memory where that is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def shards(header: Header, max_bytes: int) -> Iterator[dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """The tensors in groups of at most `max_bytes`, or a single one."""
    shard: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    size = 0
    for name, (dtype, shape) in header.items():
        num_bytes = dtype.itemsize * math.prod(shape)
        if shard and size + num_bytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = (dtype, shape)
        size += num_bytes
    yield shard


class SafetensorsWriter:
    """The shards of a folder and their index, being written. `close` it in any case.

    Args:
        folder: where; it exists.
        header: what will be written.
        max_shard_bytes: of a file, see `shards`.
        flusher: brings the files to the disk.
    """

    def __init__(self, folder: Path, header: Header, max_shard_bytes: int, flusher: Flusher) -> None:
        self._header, self._flusher = header, flusher
        self._folder = folder
        self._places: dict[str, tuple[str, int]] = {}
        self.sizes: dict[str, int] = {}
        self._opened: dict[str, OpenFile] = {}
        groups = list(shards(header, max_shard_bytes))
        for number, group in enumerate(groups, start=1):
            self._begin(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)

    def _begin(self, file: str, group: Header) -> None:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in group.items():
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        start = 8 + len(text)
        for name in group:
            entry = entries[name]
            assert isinstance(entry, dict)
            self._places[name] = (file, start + entry["data_offsets"][0])
        self.sizes[file] = start + end
        (self._folder / file).touch(exist_ok=False)
        self._opened[file] = OpenFile(self._folder / file, self._flusher)
        self._opened[file].write(len(text).to_bytes(8, "little") + text, 0)
        os.truncate(self._folder / file, start + end)

    @property
    def files(self) -> dict[str, str]:
        """The file of every tensor."""
        return {name: file for name, (file, _) in self._places.items()}

    def put(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write a tensor, or some of its rows, from row `row` on."""
        dtype, shape = self._header[name]
        assert tensor.dtype == dtype
        file, begin = self._places[name]
        self._opened[file].write(bytes_of(tensor), begin + row * dtype.itemsize * math.prod(shape[1:]))

    def finish(self) -> None:
        """Write the index, when every tensor is there."""
        total = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self._header.values())
        index = {"metadata": {"total_size": total}, "weight_map": self.files}
        atomic.write_json(self._folder / "model.safetensors.index.json", index)

    def close(self) -> None:
        """Close the files."""
        while self._opened:
            self._opened.popitem()[1].close()
