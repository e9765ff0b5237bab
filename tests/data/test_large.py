"""What must not grow with the size of the data. Minutes, and gigabytes of sparse files: marked slow."""

import json
import struct
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest

from bc2exp.data.prepare import prepare
from bc2exp.data.sources import find_source
from bc2exp.data.store import TokenStore
from bc2exp.embedded import TOKENIZER
from bc2exp.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]

PEAK = """
import json, os, sys, threading, time
from pathlib import Path

def peak(pid="self"):
    # not ru_maxrss: that begins with the memory of the process that started this one
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
"""

PREPARE = """
from bc2exp.data.prepare import prepare
from bc2exp.data.sources import find_source
from bc2exp.embedded import TOKENIZER
from bc2exp.text.tokenizer import Tokenizer
workers = {}

def tell(progress):
    if progress.stage == "encode":
        for pid in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split():
            workers[pid] = peak(pid)

source = find_source("file", sys.argv[1], None)
cache, options = Path(sys.argv[2]), {"name": "lines", "workers": 2, "progress": tell}
report = prepare(source, Tokenizer(TOKENIZER), cache, **options).report
keys = ("documents", "tokens", "empty", "bad", "seconds", "mb_per_s")
print(json.dumps({"peak": peak(), "workers": list(workers.values()), **{key: report[key] for key in keys}}))
"""

OPEN = """
from bc2exp.data.store import TokenStore
before, begin = peak(), time.perf_counter()
store = TokenStore(sys.argv[1])
(stream,) = store.streams([1])
seconds = time.perf_counter() - begin
tokens = [int(stream.sample(index, 4096)[0]) for index in (0, stream.num_samples(4096) // 2)]
segments = stream.segments(stream.num_samples(4096) - 1, 4096)
print(json.dumps({
    "tokens": len(stream.tokens), "documents": stream.num_documents, "first": tokens, "seconds": seconds,
    "segments": int(segments.max()), "grown": peak() - before,
}))
"""


def _run(program: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-c", PEAK + program, *map(str, arguments)]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_million_rows_take_no_more_memory_than_half_a_million(tmp_path: Path) -> None:
    peaks = []
    for rows in (500_000, 5_000_000):
        path = tmp_path / f"{rows}.txt"
        with path.open("w", encoding="utf-8") as file:
            for start in range(0, rows, 100_000):
                file.writelines(f"第{n}份 late\n" if n % 50 else "\n" for n in range(start, start + 100_000))
        found = _run(PREPARE, path, tmp_path / "cache")
        print(json.dumps({"rows": rows, "bytes": path.stat().st_size, **found}))
        assert (found["documents"], found["empty"], found["bad"]) == (rows * 49 // 50, rows // 50, {})
        peaks.append([found["peak"], *found["workers"]])
    assert len(peaks[1]) == 3
    assert sum(peaks[1]) < 1.1 * sum(peaks[0])


@pytest.mark.slow
def test_a_store_of_1e9_tokens_is_opened_without_reading_it(tmp_path: Path) -> None:
    # documents of 1000 tokens, which is about what web pages have
    count, length = 10**6, 1000
    with (tmp_path / "s.bin").open("wb") as file:
        file.truncate(4 * count * length)
    with (tmp_path / "s.idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, count, count + 1))
        array("i", [length] * count).tofile(file)
        array("q", range(0, 4 * count * length, 4 * length)).tofile(file)
        array("q", range(count + 1)).tofile(file)
    found = _run(OPEN, tmp_path / "s")
    print(json.dumps(found))
    assert (found["tokens"], found["documents"], found["first"]) == (10**9, 10**6, [0, 0])
    assert found["segments"] == 5
    # the index has 20 MB, and the check of it takes as much once more in a chunk
    assert found["grown"] < 200e6
    # and one that is larger than the memory of a large machine
    with (tmp_path / "t.bin").open("wb") as file:
        file.truncate(4 * 10**12)
    lengths, (big, rest) = 500, divmod(10**12, 500)
    assert not rest
    with (tmp_path / "t.idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, lengths, lengths + 1))
        array("i", [big] * lengths).tofile(file)
        array("q", range(0, 4 * 10**12, 4 * big)).tofile(file)
        array("q", range(lengths + 1)).tofile(file)
    assert len(TokenStore(tmp_path / "t").tokens) == 10**12


@pytest.mark.slow
def test_a_row_as_long_as_is_allowed_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("some words of prose, " * 700_000 + "\nshort\n")  # 14.7 MB
    tokenizer = Tokenizer(TOKENIZER)
    prepared = prepare(find_source("file", str(path), None), tokenizer, tmp_path, name="long", workers=2)
    assert prepared.report["documents"] == 2
    expected = tokenizer.encode("short")
    assert TokenStore(prepared.prefix).tokens[-len(expected) :].tolist() == expected
