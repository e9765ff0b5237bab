"""The two READMEs are twins, and their commands are what they say."""

import re
import shlex
from pathlib import Path

import pytest

from bc2exp.config.preflight import preflight
from bc2exp.embedded import TOKENIZER

REPOSITORY = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh.md")


def commands(name: str) -> list[str]:
    """The command lines of a README, in order."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_the_twins_show_the_same_commands_tables_and_output() -> None:
    english, chinese = (commands(name) for name in READMES)
    assert english == chinese
    assert len(english) >= 8
    plain = [
        re.findall(r"```\n(.*?)```", (REPOSITORY / name).read_text(encoding="utf-8"), re.DOTALL)
        for name in READMES
    ]
    assert plain[0] == plain[1]
    headings = [
        len(re.findall(r"^## ", (REPOSITORY / name).read_text(encoding="utf-8"), re.MULTILINE)) for name in READMES
    ]
    assert headings[0] == headings[1]


@pytest.mark.parametrize("command", [line for line in commands("README.md") if "-m bc2exp" in line])
def test_every_run_command_passes_the_door(command: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("送餐很快\nwarm and on time\n", encoding="utf-8")
    words = shlex.split(command.replace("TOKENIZER", str(TOKENIZER)).replace("FILE", str(tmp_path / "lines.txt")))
    words = words[len(words) - words[::-1].index("bc2exp") :]
    overrides = [word for word in words if "=" in word]
    assert preflight(overrides, sweep="-m" in words, folder=tmp_path).problems == []


def test_links_lead_somewhere() -> None:
    for name in READMES:
        for target in re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / name).read_text(encoding="utf-8")):
            assert (REPOSITORY / target).is_file(), (name, target)


def test_the_first_command_is_the_one_that_ci_and_tests_use() -> None:
    first, second = commands("README.md")[:2]
    assert first.endswith("&& .venv/bin/python -m bc2exp")
    assert second in (REPOSITORY / ".ci" / "run").read_text()
