"""The guide to Ascend NPUs: twins, words that pass the door, and facts that are the program's.

The rehearsals of the guide run where torch_npu is installed; two of them, as 8 ranks take minutes.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bc2exp.config.hardware import HardwareConfig
from bc2exp.config.preflight import preflight
from bc2exp.hardware import npu_environment
from bc2exp.hardware.rehearsal import record
from tests.pages import REPOSITORY, broken_links, commands, fenced, read, shape, table
from tests.weights.folders import SEVEN_B, weights_for_the_door

ENGLISH, CHINESE = GUIDES = ("docs/guides/ascend.md", "docs/guides/ascend.zh.md")
PARTS, PAIRS, CHECKS, VARIABLES, OPERATORS, SHOWS, COUNTED, MESSAGES = range(8)  # the tables of the guide
TYPED = [line for line in commands(ENGLISH) if "-m bc2exp" in line]
REHEARSED = [line for line in TYPED if "hardware.rehearsal=true" in line]
needs_torch_npu = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is None, reason="needs an environment with torch_npu"
)


def words_of(command: str) -> list[str]:
    """The overrides of a command line."""
    words = shlex.split(command)
    return words[words.index("bc2exp") + 1 :]


def quoted(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def test_the_twins_have_one_shape_and_one_set_of_commands() -> None:
    assert fenced(ENGLISH) == fenced(CHINESE)
    assert shape(ENGLISH) == shape(CHINESE)
    # what stands in backticks in the tables is the program's, in either language
    for number in range(8):
        one, other = ([[quoted(cell) for cell in row] for row in table(name, number)] for name in GUIDES)
        assert one == other
    assert [row[0] for row in table(ENGLISH, PAIRS)] == [row[0] for row in table(CHINESE, PAIRS)]
    # of one digit there are words, too
    figures = [sorted(re.findall(r"\d[\d.,]*\d(?:e-\d+)?", read(name))) for name in GUIDES]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


def test_every_command_passes_the_door(tmp_path: Path) -> None:
    (tmp_path / "ALPACA").mkdir()
    (tmp_path / "ALPACA" / "train.parquet").write_bytes(b"")
    weights_for_the_door(tmp_path / "WEIGHTS", **SEVEN_B)
    (tmp_path / "REVIEWS.csv").write_text("label,review\n1,好\n0,差\n", encoding="utf-8")
    tokenizer = REPOSITORY / "bc2exp" / "embedded" / "tokenizer.model"
    (tmp_path / "TOKENIZER").write_bytes(tokenizer.read_bytes())
    assert len(TYPED) == 12
    assert len(REHEARSED) == 3
    for command in TYPED:
        assert preflight(words_of(command), sweep=False, folder=tmp_path).problems == [], command


@pytest.mark.parametrize("name", GUIDES)
def test_the_variables_are_those_that_ranks_are_started_with(name: str) -> None:
    rows = table(name, VARIABLES)
    told = {variable.strip("`"): value.strip("`") for variable, value, _ in rows}
    assert len(told) == len(rows)
    assert told == npu_environment.variables({})
    assert told.keys() - npu_environment.VARIABLES.keys() == {"HCCL_EVENT_TIMEOUT"}
    text = read(name)
    for variable, value in npu_environment.DETERMINISTIC.items():
        assert f"`{variable}={value}`" in text
    for variable in npu_environment.OTHER_ALLOCATORS:
        assert f"`{variable}`" in text


def test_every_fused_operator_has_a_switch_and_is_called() -> None:
    rows = table(ENGLISH, OPERATORS)
    fields = [field.name for field in dataclasses.fields(HardwareConfig) if field.name.startswith("fused_")]
    assert [row[0] for row in rows] == [f"`hardware.{name}`" for name in fields]
    source = "".join(file.read_text() for file in (REPOSITORY / "bc2exp" / "hardware").glob("npu*.py"))
    for row in rows[:-1]:
        for operator in quoted(row[1]):
            assert f"torch_npu.{operator}(" in source


def test_the_limits_of_the_fused_operators_are_those_of_the_source() -> None:
    """Read, not imported: their modules want torch_npu."""
    hardware = REPOSITORY / "bc2exp" / "hardware"
    source = (hardware / "npu_attention.py").read_text() + (hardware / "npu.py").read_text()
    limits = [
        re.search(rf"^{name}, .* = (.*)$", source, re.MULTILINE) for name in ("MOST_HEADS", "MOST_ROTARY")
    ]
    attention, rotary = (match[1] for match in limits if match)
    assert attention == "256, 768, 2048, 2**20"
    assert rotary == "1000, 896"
    told = {row[0]: row[2] for row in table(ENGLISH, OPERATORS)}
    assert re.findall(r"[\d,]*\d", told["`hardware.fused_attention`"]) == ["256", "2048", f"{2**20:,}", "768"]
    assert re.findall(r"\d+", told["`hardware.fused_rotary`"]) == ["1000", "896"]


def test_the_keys_of_the_count_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record.metadata, "version", lambda package: "1")
    told = [key for row in table(ENGLISH, COUNTED) for key in quoted(row[0])]
    written = record.merge(tmp_path, 0)
    assert sorted(told) == sorted(written)


def templates() -> list[re.Pattern[str]]:
    """Every string of the package, as a pattern in which the parts that are filled in match anything."""
    found = set()
    for file in (REPOSITORY / "bc2exp").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            # A template of little but holes would match every message.
            if sum(len(part) for part in parts if isinstance(part, str)) >= 20:
                found.add("".join(".*" if part is None else re.escape(str(part)) for part in parts))
    return [re.compile(text) for text in found]


def test_every_message_is_one_of_the_program() -> None:
    known = templates()
    assert len(known) > 300
    for row in table(ENGLISH, MESSAGES):
        (message,) = quoted(row[0])
        assert any(pattern.fullmatch(message) for pattern in known), message
    assert not any(pattern.fullmatch("torch_npu is not installed, and torch is old") for pattern in known)


def ran(folder: Path, command: str) -> str:
    """What a command of the guide prints, typed in a folder of its own."""
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_torch_npu
def test_the_doctor_of_the_guide_checks_what_it_says(tmp_path: Path) -> None:
    printed = ran(tmp_path, REHEARSED[0])
    assert "healthy: " in printed
    (file,) = tmp_path.glob("runs/*/*/doctor.json")
    names = [check["name"].partition(",")[0] for check in json.loads(file.read_text())["checks"]]
    told = [name for row in table(ENGLISH, CHECKS) for name in quoted(row[0]) if "," not in name]
    assert list(dict.fromkeys(names)) == told  # one rank: no exchanges


@needs_torch_npu
def test_the_rehearsal_of_the_guide_runs_and_counts_as_it_says(tmp_path: Path) -> None:
    assert ran(tmp_path, REHEARSED[1]).startswith("rehearsal on host memory")
    (file,) = tmp_path.glob("runs/*/*/rehearsal.json")
    counted = json.loads(file.read_text())
    assert sorted(counted) == sorted(key for row in table(ENGLISH, COUNTED) for key in quoted(row[0]))
    assert counted["cpu_fallbacks"] == {}
    assert counted["refused_operators"] == []
    calls = {name: entry["phases"]["train"] for name, entry in counted["operators"].items()}
    assert calls["npu::npu_swiglu_backward"] == calls["npu::npu_fusion_attention"]
    names = ("fusion_attention", "swiglu", "rms_norm", "rotary_mul")
    found = [calls[name] for name in (*(f"npu::npu_{name}" for name in names), "aten::_fused_adamw_")]
    told = re.search(r"In order (.*) in the rehearsal above", read(ENGLISH))
    assert told is not None
    assert found == [int(number) for number in re.findall(r"\d+", told[1])]
