"""Devices that are not there: what is missing, and commands that work instead, before torch is imported."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from bc2exp.config.load import finalize
from bc2exp.config.nodes import find_nodes
from bc2exp.config.preflight import preflight
from bc2exp.hardware import npu_environment, probe
from bc2exp.hardware.rehearsal import build, record
from bc2exp.launch import machine

ROOT = Path(__file__).parents[2]


def type_(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """The command in a folder of its own; it says which of the slow packages it has loaded."""
    code = (
        "import sys\nfrom bc2exp.__main__ import command\ncode = command(sys.argv[1:])\n"
        "print([name for name in ('torch', 'mlflow', 'torch_npu') if name in sys.modules])\nsys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("hardware", ["1npu", "8npu", "16npu"])
def test_a_sentence_and_two_commands_that_compose(tmp_path, hardware, monkeypatch):
    if probe.count_devices("npu"):
        pytest.skip("this machine has NPUs")
    done = type_(tmp_path, "task=pretrain", f"hardware={hardware}")
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []
    number = int(hardware.removesuffix("npu"))
    sentence, *commands = done.stderr.splitlines()
    assert sentence.startswith(f"bc2exp: hardware={hardware}: asks for {number} npu device")
    assert sentence.endswith("this machine has 0")
    found = [re.search(r"python -m bc2exp (.*)", line)[1] for line in commands]
    assert ["hardware.rehearsal=true" in words for words in found] == [True, False]
    monkeypatch.chdir(tmp_path)
    for words in found:
        assert preflight(shlex.split(words), sweep=False, folder=tmp_path).problems == []


def test_only_npus_are_rehearsed(tmp_path):
    done = type_(tmp_path, "hardware=cpu", "hardware.rehearsal=true")
    assert done.returncode == 2
    assert "hardware.rehearsal=True: only NPUs are rehearsed" in done.stderr
    assert done.stdout == "[]\n"


@pytest.mark.skipif(util.find_spec("torch_npu") is not None, reason="torch_npu is here")
def test_a_rehearsal_without_torch_npu(tmp_path):
    done = type_(tmp_path, "hardware=8npu", "hardware.rehearsal=true", "model=tiny_7b")
    assert done.returncode == 2
    assert "hardware.rehearsal=true: torch_npu is not installed" in done.stderr
    assert done.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "gib"),
    [
        (("task=pretrain", "model=baichuan2_7b"), 112),
        (("task=pretrain", "model=baichuan2_13b"), 207),
        (("task=pretrain", "model=baichuan2_7b", "parallelism=ddp"), 895),
        (("task=doctor", "model=baichuan2_7b"), 21),  # two layers of 32
        (("task=pretrain", "model=tiny_7b"), None),
    ],
)
def test_a_rehearsal_that_this_machine_has_no_room_for(tmp_path, monkeypatch, words, gib):
    monkeypatch.setattr(machine.rehearsal, "prepare", lambda: None)
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: 20 * 2**30)
    checked = preflight(["hardware=8npu", "hardware.rehearsal=true", *words], sweep=False, folder=tmp_path)
    assert checked.problems == []
    plain = finalize(checked.jobs[0], tmp_path)
    if gib is None:
        machine.require(plain, find_nodes(plain))
        return
    with pytest.raises(UserError) as error:
        machine.require(plain, find_nodes(plain))
    model = "tiny_13b" if "13b" in plain["model"]["name"] else "tiny_7b"
    assert f"{plain['model']['name']} take {gib} GiB, and this machine has 20; " in str(error.value)
    assert str(error.value).endswith(f"rehearse model={model}, which makes the same calls")


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """torch_npu is said to be there and to pair; nothing has been compiled yet."""
    monkeypatch.setattr(npu_environment, "problems", lambda *_, **__: [])
    monkeypatch.setattr(build.metadata, "version", lambda name: "2.13.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_rehearsal_without_a_compiler(fresh_cache, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler is not there; install a C compiler with binutils"):
        build.libraries()
    assert list(fresh_cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(fresh_cache, monkeypatch):
    (fresh_cache / "bc2exp").touch()
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setenv("NM", sys.executable)
    with pytest.raises(UserError, match="cannot be written to"):
        build.libraries()


def test_the_c_files_are_all_there():
    assert {file.name for file in build.NATIVE.glob("*.c")} == set(build.SOURCES)


def counted(**sections):
    entry = {"calls": 2, "tensors": [{"calls": 2, "arguments": ["float32[2]"]}]}
    empty = {"collectives": {}, "host_kernels": {}, "refused_operators": [], "refused_runtime_calls": {}}
    return {"operators": {"a": entry}, **empty, "cpu_fallbacks": {}, "peak_memory_bytes": 5, **sections}


def test_ranks_are_merged_and_their_differences_told(tmp_path, monkeypatch):
    monkeypatch.setattr(record.metadata, "version", lambda name: "2.13.0")
    (tmp_path / "logs").mkdir()
    refusal = {"operator": "npu::b", "reason": "no", "calls": 1}
    other = {"a": {"calls": 1, "tensors": [{"calls": 1, "arguments": ["float32[2]"]}]}}
    record.write_rank(tmp_path, 0, counted())
    record.write_rank(tmp_path, 1, counted())
    record.write_rank(tmp_path, 2, counted(operators=other, refused_operators=[refusal]))
    record.write_rank(tmp_path, 3, counted(cpu_fallbacks={"aten::c": 7}))
    merged = record.merge(tmp_path, 5)
    assert merged["operators"] == counted()["operators"]
    assert merged["ranks_without_a_count"] == [4]
    assert merged["refused_operators"] == [{"rank": 2, **refusal}]
    assert merged["cpu_fallbacks"] == {"aten::c": 7}
    assert merged["ranks_that_differ"] == {
        "2": {"operators": other},
        "3": {"cpu_fallbacks": {"aten::c": 7}},
    }
    record.clear(tmp_path)
    assert record.merge(tmp_path, 5)["ranks_without_a_count"] == [0, 1, 2, 3, 4]
