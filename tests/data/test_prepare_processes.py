import json
import os
import re
import signal
import subprocess
import sys
import threading
from array import array
from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from bc2exp.data import prepare as prepare_module
from bc2exp.data.building import Progress
from bc2exp.data.prepare import Prepared
from bc2exp.data.sources import TextSource, find_source
from bc2exp.data.store import TokenStore
from bc2exp.embedded import TOKENIZER
from tests.data.kills import dies_at
from tests.data.preparing import content_of, prepare_texts, remains_in, source_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("many_batches")


def _program(source: TextSource, cache: Path, at_first_batch: str) -> subprocess.Popen[str]:
    """A process that prepares with two workers, and does something once the first batch is written."""
    program = f"""
import os, signal, sys, threading
from pathlib import Path
import torch
from bc2exp.data import building
from bc2exp.data.prepare import prepare
from bc2exp.data.sources import find_source
from bc2exp.text.tokenizer import Tokenizer
torch.randn(500, 500) @ torch.randn(500, 500)  # its threads live
building._BATCH_BYTES = 3000
seen = []
def tell(progress):
    if progress.stage == "encode" and not seen:
        seen.append(progress)
        children = Path(f"/proc/self/task/{{threading.get_native_id()}}/children").read_text()
        print(children, flush=True)
        {at_first_batch}
source = find_source("file", {str(source.files[0])!r}, "text")
tokenizer, cache = Tokenizer(Path({str(TOKENIZER)!r})), Path({str(cache)!r})
prepared = prepare(source, tokenizer, cache, name="text", workers=2, progress=tell)
print(prepared.reused, flush=True)
"""
    # no guard around the main module's code: the workers must not run it again
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"ended with {process.wait()}"
    return line.strip()


def _lives(pid: int) -> bool:
    try:
        return b"bc2exp" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_kill_9_in_the_middle_leaves_no_store_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    source, cache = source_of(tmp_path), tmp_path / "cache"
    expected = content_of(prepare_texts(source, tmp_path / "clean"))
    process = _program(source, cache, "signal.pause()")
    workers = [int(pid) for pid in _line(process).split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    partial, listed = remains_in(cache)
    assert re.fullmatch(r"\.text-[0-9a-f]{12}\.partial", partial)
    assert listed.endswith("quarantine.jsonl")
    while any(_lives(pid) for pid in workers):
        pass
    # another data set's start cleans up as well, and leaves what is somebody's
    living = cache / ".other-0123456789ab.partial"
    living.mkdir()
    with prepare_module.lock.hold(cache / ".other-0123456789ab.lock"):
        prepare_texts(find_source("embedded_reviews", None, None), cache)
        assert [name for name in remains_in(cache) if not re.fullmatch("text-[0-9a-f]{12}", name)] == [
            living.name
        ]
    result = prepare_texts(source, cache)
    assert not result.reused
    assert content_of(result) == expected
    assert not living.exists()


def test_a_kill_at_any_step_leaves_no_half_store(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    expected = content_of(prepare_texts(source, tmp_path / "clean"))
    steps, died = 0, True
    while died:
        cache = tmp_path / f"cache{steps}"
        died = dies_at(steps, lambda cache=cache: prepare_texts(source, cache))
        for folder in cache.glob("text-*[0-9a-f]"):
            found = {path.name: path.read_bytes() for path in folder.iterdir()}
            assert json.loads(found.pop("report.json"))["documents"] == 900
            assert found == expected
        result = prepare_texts(source, cache)
        assert content_of(result) == expected
        assert remains_in(cache) == [result.prefix.parent.name]
        assert not list(cache.glob(".*.tmp"))
        steps += 1
    assert steps > 12


def test_two_processes_prepare_once(tmp_path: Path) -> None:
    source, cache = source_of(tmp_path), tmp_path / "cache"
    process = _program(source, cache, "sys.stdin.readline()")
    _line(process)
    waits = threading.Event()
    told: list[Progress] = []

    def tell(progress: Progress) -> None:
        told.append(progress)
        if progress.stage != "fingerprint":
            waits.set()

    results: list[Prepared] = []
    second = threading.Thread(target=lambda: results.append(prepare_texts(source, cache, progress=tell)))
    second.start()
    waits.wait()
    assert process.stdin is not None
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert _line(process) == "False"
    second.join()
    assert process.wait() == 0
    (result,) = results
    assert result.reused
    assert [progress.stage for progress in told] == ["fingerprint", "wait"]
    assert remains_in(cache) == [result.prefix.parent.name]
    assert array("i", content_of(result)["tokens.bin"]).tolist() == TokenStore(result.prefix).tokens.tolist()


def test_a_worker_that_is_killed_is_named(tmp_path: Path) -> None:
    source, cache = source_of(tmp_path), tmp_path / "cache"

    def kill_one(progress: Progress) -> None:
        if progress.stage == "encode" and progress.rows < 100:
            # the newest: other tests of this process may have left it a helper, such as a resource tracker
            pid = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()[-1]
            os.kill(int(pid), signal.SIGKILL)

    with pytest.raises(UserError, match=r"a process that encodes text was ended by signal 9"):
        prepare_texts(source, cache, workers=2, progress=kill_one)
    assert remains_in(cache) == []
