"""Texts to tokens in several processes, in order.

The processes are programs of their own (`python -m bc2exp.data.encoding`) and not multiprocessing's: they
load SentencePiece and nothing else, do not run the caller's main module again, share no state with its
threads, and end by themselves when the pipe to the caller closes, kill -9 included.

On the pipes, in both directions: two uint64, a and b; a int32 lengths; b bytes. To the process: texts and
their UTF-8. Back: documents that have tokens, and the int32 tokens.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO, NamedTuple

from bc2exp.config.errors import UserError
from bc2exp.text.tokenizer import Tokenizer

_SIZES = struct.Struct("<QQ")
_QUEUED = 3
_PIPE_BYTES = 2**20


class Batch(NamedTuple):
    """Texts that are encoded together.

    Attributes:
        texts: UTF-8.
        rows: rows read up to the end of this batch, bad and empty ones included.
        bytes_done: bytes of the files read up to there.
    """

    texts: list[bytes]
    rows: int
    bytes_done: int


class Encoded(NamedTuple):
    """The tokens of a batch.

    Attributes:
        lengths: int32, tokens of each document; texts without a token are left out.
        tokens: int32, one document after the other.
    """

    lengths: array[int]
    tokens: array[int]


class Encoder:
    """Encodes batches with a tokenizer, in `workers` processes, or in this one where that is 1.

    Use in a `with`, which ends the processes.
    """

    def __init__(self, tokenizer: Tokenizer, *, append_eos: bool, workers: int) -> None:
        self._append_eos = append_eos
        self._local = tokenizer if workers <= 1 else None
        self._processes = [] if self._local else [_start(tokenizer.path, append_eos) for _ in range(workers)]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(max(1, len(self._processes)))

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Encoded]]:
        """Each batch with its tokens, in order; reads ahead by a few batches.

        Raises:
            UserError: a process ended, killed for want of memory perhaps.
        """
        if self._local:
            for batch in batches:
                yield batch, encode_texts(self._local, batch.texts, self._append_eos)
            return
        pending: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch in batches:
            pending.append((batch, self._threads.submit(self._ask, batch.texts)))
            while len(pending) >= _QUEUED * len(self._processes):
                batch, future = pending.popleft()
                yield batch, future.result()
        for batch, future in pending:
            yield batch, future.result()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        # the threads wait for answers of the processes; what is still queued finds them gone
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def _ask(self, texts: list[bytes]) -> Encoded:
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, array("i", map(len, texts)), b"".join(texts))
            lengths, content = _receive(process.stdout)
        except (EOFError, OSError):
            code = process.wait()
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            raise UserError(
                f"a process that encodes text {how}; if the machine ran out of memory, fewer workers or a "
                "smaller dataset.max_row_bytes take less"
            ) from None
        finally:
            self._idle.put(process)
        return Encoded(lengths, array("i", content))


def encode_texts(tokenizer: Tokenizer, texts: list[bytes], append_eos: bool) -> Encoded:
    """The tokens of texts (UTF-8); one that has none is no document, with or without an end-of-text."""
    lengths, tokens = array("i"), array("i")
    for ids in tokenizer.encode_documents(texts):
        if not ids:
            continue
        if append_eos:
            ids.append(tokenizer.eos_id)
        lengths.append(len(ids))
        tokens.extend(ids)
    return Encoded(lengths, tokens)


def serve(tokenizer: Path, append_eos: bool, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more: what an encoding process does."""
    encoder = Tokenizer(tokenizer)
    while True:
        try:
            lengths, content = _receive(requests)
        except EOFError:
            return
        texts, start = [], 0
        for length in lengths:
            texts.append(content[start : start + length])
            start += length
        encoded = encode_texts(encoder, texts, append_eos)
        _send(answers, encoded.lengths, encoded.tokens.tobytes())


def _start(tokenizer: Path, append_eos: bool) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "bc2exp.data.encoding", str(tokenizer), "eos" if append_eos else ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        # a whole answer fits, so that nobody waits for the other to read it
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return process


def _send(stream: IO[bytes], lengths: array[int], content: bytes) -> None:
    stream.write(_SIZES.pack(len(lengths), len(content)))
    stream.write(lengths.tobytes())
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[array[int], bytes]:
    num_lengths, num_bytes = _SIZES.unpack(_read(stream, _SIZES.size))
    return array("i", _read(stream, 4 * num_lengths)), _read(stream, num_bytes)


def _read(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


if __name__ == "__main__":
    # Ctrl-C reaches the whole process group; the caller decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        serve(Path(sys.argv[1]), bool(sys.argv[2]), sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:
        os._exit(1)
