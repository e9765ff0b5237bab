"""The guide to evaluation: twins; its commands run in the order of the page; its messages are those of the
program; its settings those of the configuration."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from bc2exp.config.errors import UserError
from bc2exp.config.load import finalize
from bc2exp.config.nodes import find_nodes
from bc2exp.config.preflight import preflight
from bc2exp.config.root import Config
from bc2exp.launch.conversation import converse
from bc2exp.report.evaluation import summarize_evaluation, tables
from bc2exp.tracking.talk import Lines
from tests.guide_runs import do
from tests.launch.test_conversation import Keyboard
from tests.one_thread import one_thread
from tests.pages import broken_links, commands, fenced, shape, table
from tests.small_run import small_words
from tests.train.parts import Memory
from tests.weights.folders import SEVEN_B, weights_for_the_door

__all__ = ["one_thread"]

ENGLISH, CHINESE = GUIDES = ("docs/guides/evaluation.md", "docs/guides/evaluation.zh.md")
MODELS, FIGURES, PROMPTS, SETTINGS, MESSAGES = range(5)  # the tables of the guide


def words_of(command: str) -> tuple[list[str], list[str]]:
    """The overrides of a command line, and what a pipe brings it."""
    piped, _, command = command.rpartition(" | ")
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "bc2exp"]
    return words[3:], [re.findall(r"'(.*)\\n'", piped)[0]] if piped else []


def answered(site: Path, words: list[str], prompts: list[str]) -> tuple[Path, Memory]:
    """Do the task of a command line in `site`, on one rank; the run folder and the journal.

    Raises UserError with what a person would be told.
    """

    def ask(config: Config, run: Path) -> None:
        if config.task.name == "generate":
            lines = Lines(run / "requests.jsonl")
            for prompt in prompts or config.task.prompts or [config.task.prompt]:
                lines.write(prompt=prompt)
            lines.write(end=True)

    return do(site, words, ask)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Path, Memory]]]:
    """What the commands of the guide left, one after the other; those that ask for other devices are only
    composed. The folder they were typed in."""
    site, done = tmp_path_factory.mktemp("site"), []
    (site / "waimai_10k.csv").write_text("label,review\n1,好\n0,差\n", encoding="utf-8")
    for command in commands(ENGLISH):
        words, prompts = words_of(command)
        if "hardware=8npu" in words:
            folder = weights_for_the_door(site / "Baichuan2-7B-Base", **SEVEN_B)
            shutil.copy(site / "runs" / "tuned" / "weights" / "tokenizer.model", folder)
        if any(word.startswith("hardware=") for word in words):
            assert preflight(words, sweep=False, folder=site).problems == []
            continue
        done.append(answered(site, words, prompts))
    return site, done


def test_the_twins_have_one_shape_and_one_set_of_commands() -> None:
    assert fenced(ENGLISH) == fenced(CHINESE)
    assert shape(ENGLISH) == shape(CHINESE)
    for number, column in ((MODELS, 0), (FIGURES, 2), (SETTINGS, 0), (SETTINGS, 1), (MESSAGES, 0)):
        one, other = ([row[column] for row in table(name, number)] for name in GUIDES)
        assert one == other
    assert [row[0] for row in table(ENGLISH, PROMPTS)[:3]] == [row[0] for row in table(CHINESE, PROMPTS)[:3]]


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


def test_the_commands_do_what_they_say_one_after_the_other(followed) -> None:
    _, done = followed
    _, (judged, _), (plain, _), *answered = done
    report = json.loads((judged / "evaluation.json").read_text())
    assert list(report["models"]) == ["base", "tuned"]
    assert list(json.loads((plain / "evaluation.json").read_text())["losses"]) == ["tiny_7b"]
    answers = [
        [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()] for run, _ in answered
    ]
    assert [[each["prompt"] for each in part] for part in answers] == [
        ["送餐很快", "等了两个小时"],
        ["送餐很快"],
        ["Once upon a time"],
    ]
    assert {each["answer"] for each in answers[0]} <= {"积极", "消极"}  # it was tuned on this template


def test_the_output_is_what_is_printed(followed) -> None:
    """Its lines, those with figures of a training but for the figures: they differ between processors."""
    _, done = followed
    judged = done[1][0]
    (judged / "metrics.jsonl").touch()
    console = Console(width=100, file=(judged / "shown").open("w", encoding="utf-8"))
    for each in tables(summarize_evaluation(judged)):
        console.print(each, soft_wrap=True)
    console.file.close()
    (example,) = (block for block in fenced(ENGLISH) if "McNemar" in block)

    def form(line: str) -> str:
        words = re.sub(r"p (below )?[\d.e-]+$|[+-]?\d+(\.\d+)?%?", "#", line)
        # what an untrained and a scarcely trained model say is anybody's guess
        return re.sub(r"(│ 积极|│ 消极)  │ .*", r"\1", words)

    printed = {form(line) for line in (judged / "shown").read_text().splitlines()}
    missing = [line for line in example.strip().splitlines() if line != "..." and form(line) not in printed]
    assert missing == []


def test_the_metrics_are_those_of_the_journal(followed) -> None:
    _, done = followed
    logged = set(done[1][1].steps)
    for row in table(ENGLISH, FIGURES):
        for name in re.findall(r"`([^`]+)`", row[-1]):
            assert name in logged


def test_the_settings_are_those_of_the_configuration(tmp_path: Path) -> None:
    job = preflight(["task=generate"], sweep=False, folder=tmp_path).jobs[0]
    for key, value, _ in table(ENGLISH, SETTINGS):
        found = OmegaConf.select(job, key.strip("`"))
        expected = OmegaConf.select(job, value.strip("`")) if value.startswith("`") else value
        assert str(found) == str(expected), key


def test_the_words_for_models_pass_the_door(followed) -> None:
    site, _ = followed
    for name in ("a", "b"):
        shutil.copytree(site / "runs" / "tuned" / "weights", site / "runs" / name)
    for row in table(ENGLISH, MODELS):
        words = ["task=evaluate", f"task.models={shlex.split(row[0].strip('`'))[0]}"]
        if "," in words[1]:
            words[1] = f"task.models={' '.join(shlex.split(row[0].strip('`')))}"
        assert preflight(words, sweep=False, folder=site).problems == [], words


def judge(site: Path, words: tuple[str, ...]) -> None:
    answered(site, small_words(*words), [])


def ask(site: Path, words: tuple[str, ...]) -> None:
    """What the parent does before it starts ranks."""
    checked = preflight(words, sweep=False, folder=site)
    if checked.problems:
        raise UserError("\n".join(checked.problems))
    plain = finalize(checked.jobs[0], site)
    converse(plain, find_nodes(plain))


def test_the_messages_are_those_that_a_person_gets(
    followed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site, _ = followed
    weights = site / "runs" / "tuned" / "weights"
    shutil.copytree(weights, site / "bare")
    (site / "bare" / "tokenizer.model").unlink()
    shutil.copytree(weights, site / "bent")
    config = json.loads((weights / "config.json").read_text()) | {"hidden_size": 48}
    (site / "bent" / "config.json").write_text(json.dumps(config))
    rows = [("review", "label"), *((f"送餐{n}", str(n % 2)) for n in range(20))]
    rows[3] = ("好" * 500, "1")
    with (site / "long.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    evaluate = "task=evaluate"
    long = ("dataset=waimai_10k", "dataset.path=long.csv", "dataset.num_train=1", "model.max_positions=64")
    several = ("launch.nnodes=2", "launch.node_rank=0", "launch.rdzv_endpoint=localhost:29511")
    cases = [
        (evaluate, "task.models={base: null, tuned: runs/tunde}"),
        (evaluate, "task.models=runs"),
        ("task=generate", "task.model=bare"),
        (evaluate, "task.models=bent"),
        (evaluate, *long, "dataset.sequence_length=64"),
        ("task=generate",),
        ("task=generate", "hardware=2cpu", *several, f"hydra.run.dir={tmp_path}/run"),
    ]
    quoted = [row[0].strip("`") for row in table(ENGLISH, MESSAGES)]
    assert len(quoted) == len(cases)
    for words, message in zip(cases, quoted, strict=True):
        monkeypatch.setattr("sys.stdin", Keyboard() if several[0] in words else None)
        with pytest.raises(UserError) as error:
            (ask if "task=generate" in words else judge)(site, words)
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert re.fullmatch(pattern, str(error.value)), f"{message}\n{error.value}"
