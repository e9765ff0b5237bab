"""The guide to several machines: twins whose commands pass the door, and messages that are the program's.

The commands themselves are run by tests/launch/test_two_machines.py, in networks of their own.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bc2exp.config.nodes import find_nodes
from bc2exp.config.preflight import preflight
from tests.pages import REPOSITORY, broken_links, commands, fenced, read, shape, table

ENGLISH, CHINESE = GUIDES = ("docs/guides/several_machines.md", "docs/guides/several_machines.zh.md")
SBATCH = "docs/examples/two_nodes.sbatch"
MESSAGES = 2
TYPED = [line for line in commands(ENGLISH) if "-m bc2exp" in line]


def overrides(command: str) -> list[str]:
    words = shlex.split(command)
    return words[words.index("bc2exp") + 1 :]


def test_the_twins_have_one_shape_and_one_set_of_commands() -> None:
    assert fenced(ENGLISH) == fenced(CHINESE)
    assert shape(ENGLISH) == shape(CHINESE)
    for number in range(3):
        rows = [[row[0] for row in table(name, number)] for name in GUIDES]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


def test_the_commands_differ_in_the_number_of_the_machine_only(tmp_path: Path) -> None:
    assert len(TYPED) == 2
    assert TYPED[0].replace("node_rank=0", "node_rank=1") == TYPED[1]
    for command in TYPED:
        assert preflight(overrides(command), sweep=False, folder=tmp_path).problems == []


def test_the_job_is_complete_with_slurms_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = [line for line in read(SBATCH).splitlines() if line.startswith("srun ")]
    words = overrides(command)
    assert preflight(words, sweep=False, folder=tmp_path).problems == []  # one machine, without Slurm
    slurm = {"NNODES": "2", "NODEID": "1", "JOB_NODELIST": "n[1-2]", "JOB_ID": "98765", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    checked = preflight(words, sweep=False, folder=tmp_path)
    assert checked.problems == []
    launch = {"nnodes": None, "node_rank": None, "rdzv_endpoint": None, "wait_s": 600.0}
    plain = {"launch": launch, "hardware": {"num_devices": 4}, "task": {"name": "pretrain"}}
    assert find_nodes(plain).endpoint == "n1:28765"
    for line in ("--ntasks-per-node=1", "--nodes=2"):
        assert f"#SBATCH {line}" in read(SBATCH)


def test_the_advice_for_two_machines_of_8_gpus_passes_the_door(tmp_path: Path) -> None:
    (advice,) = [line for line in read(SBATCH).splitlines() if line.startswith("#   hardware=")]
    words = [*advice.strip("# ").split(), "hydra.run.dir=x", *overrides(TYPED[0])[1:-1]]
    assert preflight(words, sweep=False, folder=tmp_path).problems == []


@pytest.mark.parametrize("message", [row[0].strip("`") for row in table(ENGLISH, MESSAGES)])
def test_the_messages_are_those_of_the_program(message: str) -> None:
    """As the source writes them: parts of strings over several lines, joined, with their numbers left out."""
    sources = [*(REPOSITORY / "bc2exp").glob("launch/*.py"), *(REPOSITORY / "bc2exp").glob("config/*.py")]
    text = "".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8")) for file in sources)
    pattern = re.escape(message).replace("node\\ 1\\ did", r"node\ \{names\}\ did")
    assert re.search(pattern, text), message
