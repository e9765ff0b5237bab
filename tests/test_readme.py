"""The two READMEs are twins, and their commands are what they say."""

import re
import shlex
from pathlib import Path

import pytest

from bc2exp.config.preflight import preflight
from bc2exp.embedded import TOKENIZER

REPOSITORY = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh.md")


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def fenced(name: str) -> list[str]:
    """The fenced blocks of a README, their kind in the first line."""
    return read(name).split("```")[1::2]


def commands(name: str) -> list[str]:
    """The command lines of a README, in order."""
    return [line for block in fenced(name) if block.startswith("bash") for line in block.splitlines()[1:]]


def test_the_twins_show_the_same_commands_and_output() -> None:
    assert fenced("README.md") == fenced("README.zh.md")
    assert len(commands("README.md")) >= 8
    for pattern in (r"^##+ ", r"^\|"):  # as many headings, as many rows of tables
        english, chinese = (re.findall(pattern, read(name), re.MULTILINE) for name in READMES)
        assert english == chinese


@pytest.mark.parametrize("command", [line for line in commands("README.md") if "-m bc2exp" in line])
def test_every_run_command_passes_the_door(command: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("送餐很快\nwarm and on time\n", encoding="utf-8")
    named = command.replace("TOKENIZER", str(TOKENIZER)).replace("FILE", str(tmp_path / "lines.txt"))
    words = shlex.split(named)
    words = words[len(words) - words[::-1].index("bc2exp") :]
    overrides = [word for word in words if "=" in word]
    assert preflight(overrides, sweep="-m" in words, folder=tmp_path).problems == []


def test_links_lead_somewhere() -> None:
    for name in READMES:
        for target in re.findall(r"\]\(([^)#]+)\)", read(name)):
            assert (REPOSITORY / target).is_file(), (name, target)


def test_the_first_command_is_the_one_that_ci_and_tests_use() -> None:
    first, second = commands("README.md")[:2]
    assert first.endswith("&& .venv/bin/python -m bc2exp")
    assert second in (REPOSITORY / ".ci" / "run").read_text()
