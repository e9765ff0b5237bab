"""The two READMEs are twins, and their commands are what they say."""

import json
import re
import shlex
from pathlib import Path

import pytest

from bc2exp.config.preflight import preflight
from bc2exp.embedded import TOKENIZER
from tests.pages import REPOSITORY, broken_links, commands, fenced, read, shape, table
from tests.weights.folders import SEVEN_B, weights_for_the_door

READMES = ("README.md", "README.zh.md")
FAST = (
    ("train_step", "loss", ("tokens/s against trainer", "peak memory against trainer")),
    ("train_step", "middle", ("tokens/s against trainer", "peak memory against trainer")),
    ("train_step", "body", ("tokens/s against trainer", "peak memory against trainer")),
    ("finetune", "256 wide, 2 layers", ("reviews/s against fixed",)),
    ("finetune", "256 wide, 2 layers", ("reviews/s against dynamic",)),
    ("prepare", "call", ("tokens/s against megatron way",)),
    ("start_up", "tiny_7b, one process", ("seconds to the first step, of a bare script's",)),
)
"""Of which records the table of speeds is made: case and figures of each row."""


def test_the_twins_show_the_same_commands_and_output() -> None:
    assert fenced("README.md") == fenced("README.zh.md")
    assert len(commands("README.md")) >= 8
    assert shape("README.md") == shape("README.zh.md")


@pytest.mark.parametrize("command", [line for line in commands("README.md") if "-m bc2exp" in line])
def test_every_run_command_passes_the_door(command: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("送餐很快\nwarm and on time\n", encoding="utf-8")
    (tmp_path / "reviews.csv").write_text("label,review\n1,warm and on time\n0,cold\n", encoding="utf-8")
    # as the commands before it leave them
    run = tmp_path / "runs" / "tuned"
    run.mkdir(parents=True)
    (run / "resolved.yaml").write_text("{}")
    (run / "metrics.jsonl").touch()
    made = [run / "weights", *([tmp_path / "megatron"] if "task.source=megatron" in command else [])]
    for folder in made:
        weights_for_the_door(folder)
        (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    seven = weights_for_the_door(tmp_path / "published", **SEVEN_B)
    named = command.replace("TOKENIZER", str(TOKENIZER)).replace("WEIGHTS", str(seven))
    for placeholder in ("FILE", "ALPACA"):
        file = "reviews.csv" if "waimai" in command else "lines.txt"
        named = named.replace(placeholder, str(tmp_path / file))
    words = shlex.split(named)
    words = words[len(words) - words[::-1].index("bc2exp") :]
    overrides = [word for word in words if "=" in word]
    assert preflight(overrides, sweep="-m" in words, folder=tmp_path).problems == []


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


@pytest.mark.parametrize("name", READMES)
def test_what_it_says_of_speed_is_in_the_records(name: str) -> None:
    processors = set()
    for (record, case, figures), row in zip(FAST, table(name, -2), strict=True):
        found = json.loads((REPOSITORY / "benchmarks" / "results" / f"{record}.json").read_text())
        ratios = {entry["name"]: entry["value"] for entry in found["ratios"] if entry["case"] == case}
        said = re.findall(r"\d+(?:\.\d+)?", row[-1])
        assert len(said) == len(figures)
        for text, figure in zip(said, figures, strict=True):
            digits = len(text.partition(".")[2])
            assert f"{ratios[figure]:.{digits}f}" == text, (row, figure)
        processors.add(found["machine"]["processor"])
    (processor,) = processors
    assert processor in read(name)


def test_the_first_command_is_the_one_that_ci_and_tests_use() -> None:
    first, second = commands("README.md")[:2]
    assert first.endswith("&& .venv/bin/python -m bc2exp")
    assert second in (REPOSITORY / ".ci" / "run").read_text()
