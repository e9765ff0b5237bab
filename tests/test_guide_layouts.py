"""The guide to layouts: twins, words that pass the door, messages that a person gets, figures of the planner.

Trainings of several ranks are only composed here: tests/parallel/test_checkpoints.py continues a checkpoint
of one layout in another, tests/parallel/test_parity.py asserts what the parity command prints.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from bc2exp.config.errors import UserError
from bc2exp.config.load import finalize, read
from bc2exp.config.nodes import find_nodes
from bc2exp.config.preflight import preflight
from bc2exp.config.root import Config
from bc2exp.launch import machine
from bc2exp.plan.planner import Plan, Planner
from bc2exp.report.plan import tables, verdict
from bc2exp.tasks.plan import make_choice, make_planner, plan
from bc2exp.tracking.journal import NullJournal
from tests.pages import REPOSITORY, broken_links, commands, fenced, shape, table
from tests.parallel.problem import CASES
from tests.train.parts import ONE_RANK, Memory

ENGLISH, CHINESE = GUIDES = ("docs/guides/layouts.md", "docs/guides/layouts.zh.md")
CHOICES, DEGREES, NAMES, KEYS, PRICES, MESSAGES = range(6)  # the tables of the guide
TYPED = [line for line in commands(ENGLISH) if "-m bc2exp" in line]
RECIPES = [line for line in TYPED if line.startswith("python -m bc2exp task=plan hardware=8npu")][:2]


def words_of(command: str) -> list[str]:
    """The overrides of a command line."""
    words = shlex.split(command)
    return [word for word in words[words.index("bc2exp") + 1 :] if word != "-m"]


def composed(folder: Path, words: list[str]) -> Config:
    """The configuration of a command line, as ranks read it."""
    checked = preflight(words, sweep=False, folder=folder)
    assert checked.problems == []
    (folder / "resolved.yaml").write_text(OmegaConf.to_yaml(finalize(checked.jobs[0], folder)))
    return read(folder / "resolved.yaml")


def test_the_twins_have_one_shape_and_one_set_of_commands() -> None:
    assert fenced(ENGLISH) == fenced(CHINESE)
    assert shape(ENGLISH) == shape(CHINESE)
    # what stands in backticks in the tables is the program's, in either language
    for number, column in ((CHOICES, -1), (DEGREES, 0), (KEYS, 0), (MESSAGES, 0)):
        one, other = ([row[column] for row in table(name, number)] for name in GUIDES)
        assert one == other
    assert table(ENGLISH, PRICES) == table(CHINESE, PRICES)


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


@pytest.mark.parametrize("name", GUIDES)
def test_every_layout_is_named(name: str) -> None:
    named = re.findall(r"`(\w+)`", "".join(row[0] for row in table(name, NAMES)))
    assert sorted(named) == sorted(file.stem for file in (REPOSITORY / "conf" / "parallelism").glob("*.yaml"))


def test_every_command_passes_the_door(tmp_path: Path) -> None:
    (tmp_path / "runs" / "moving").mkdir(parents=True)
    (tmp_path / "runs" / "moving" / "run.json").write_text("{}")  # what the first of two commands leaves
    assert len(TYPED) == 8
    for command in TYPED:
        checked = preflight(words_of(command), sweep="bc2exp -m" in command, folder=tmp_path)
        assert checked.problems == [], command


@pytest.mark.parametrize("words", [row[1].strip("`") for row in table(ENGLISH, CHOICES)])
def test_the_words_for_a_case_pass_the_door(words: str, tmp_path: Path) -> None:
    assert preflight(words.split(), sweep=False, folder=tmp_path).problems == []


def test_the_parity_command_names_cases_and_shows_what_it_prints() -> None:
    (command,) = [line for line in commands(ENGLISH) if "parity" in line]
    names = shlex.split(command)[3:]
    assert set(names) <= set(CASES)
    (output,) = [block for block in fenced(ENGLISH) if "recompute     loss" in block]
    lines = output.strip().splitlines()[1:]
    assert len(lines) == 2 * 3 * len(names)
    for line in lines:
        assert line[:22].strip() in names
        assert all(float(figure) < 1e-5 for figure in line.split()[-5:-1])


def rendered(report: dict) -> str:
    """The first table of a plan and its verdict, as a terminal shows them."""
    console = Console(file=io.StringIO(), width=100)
    console.print(tables(report)[0])
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue() + verdict(report)


@pytest.mark.parametrize("number", range(2))
def test_the_plans_of_the_two_recipes_are_those_of_the_program(number: int, tmp_path: Path) -> None:
    shown = [block.strip() for block in fenced(ENGLISH) if "memory of a device" in block]
    assert len(shown) == len(RECIPES) == 2
    config = composed(tmp_path, [*words_of(RECIPES[number]), "task.alternatives=0"])
    assert plan(config, tmp_path, ONE_RANK, Memory()) == "done"
    assert rendered(json.loads((tmp_path / "plan.json").read_text())) == shown[number]


@pytest.mark.slow
def test_the_prices_are_those_of_the_program(tmp_path: Path) -> None:
    planners: dict[str, Planner] = {}
    for words, *figures in table(ENGLISH, PRICES):
        config = composed(tmp_path, ["task=plan", "hardware=8npu", *words.strip("`").split()])
        recipe = config.task.recipe
        planner = planners.setdefault(recipe, make_planner(config, NullJournal()))
        found: Plan = planner.plan(make_choice(config), exact=True)
        assert found.time is not None
        sizes = (found.memory.gathered, found.memory.activations, found.memory.total)
        assert [f"{size / 2**30:.1f}" for size in sizes] + [f"{found.time.step:.3g}"] == figures, words


def told(folder: Path, *words: str) -> str:
    """The one sentence with which a command line is refused, at the door or by the launcher."""
    checked = preflight(words, sweep=False, folder=folder)
    if not checked.problems:
        plain = finalize(checked.jobs[0], folder)
        with pytest.raises(UserError) as error:
            machine.require(plain, find_nodes(plain))
        return str(error.value).splitlines()[0]  # commands that work follow it
    (problem,) = checked.problems
    return problem


REFUSED = [
    ("hardware=4cpu", "parallelism=single"),
    ("hardware=4cpu", "parallelism=tp2_pp2_dp2"),
    ("hardware=4cpu", "parallelism=hsdp", "parallelism.replicate=3"),
    ("hardware=4cpu", "parallelism.replicate=-1", "parallelism.shard=-1"),
    ("hardware=8cpu", "parallelism=tp", "model.num_heads=12", "model.hidden_size=96"),
    ("hardware=4cpu", "parallelism=tp", "dataset.sequence_length=30"),
    ("hardware=8cpu", "parallelism=tp", "model.vocab_size=9"),
    ("hardware=4cpu", "parallelism=pp4"),
    ("hardware=4cpu", "parallelism.sequence_parallel=true"),
    ("hardware=4cpu", "task.global_batch=6"),
    ("hardware=2cpu", "parallelism=pp2", "task.micro_batch=8"),
    ("hardware=4cpu", "parallelism=zero3", "parallelism.zero_stage=1"),
    ("hardware=4cpu", "parallelism=zero4"),
    ("hardware=8npu",),
    ("hardware=8gpu",),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_the_messages_are_those_that_a_person_gets(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "count_devices", lambda backend: None if backend == "cpu" else 0)
    quoted = [row[0].strip("`") for row in table(ENGLISH, MESSAGES)]
    assert len(quoted) == len(REFUSED)
    pattern = ".*".join(map(re.escape, quoted[number].split("…")))
    given = told(tmp_path, *REFUSED[number])
    assert re.fullmatch(pattern, given), f"{quoted[number]}\n{given}"
