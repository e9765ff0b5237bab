"""The guide to comparing: twins, commands that run on small files of their names, messages that a person
gets; and the README of the study, whose figures are those of its table."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from bc2exp import __main__ as door
from bc2exp.config.preflight import preflight
from bc2exp.launch.compare import points
from bc2exp.report.compare.comparison import Tolerances, compare
from bc2exp.report.compare.tables import sentences
from tests.pages import REPOSITORY, broken_links, commands, fenced, shape, table
from tests.report.compare.logs import MODELLINK, TRAINER, lines, loss_at, side

ENGLISH, CHINESE = GUIDES = ("docs/guides/comparing.md", "docs/guides/comparing.zh.md")
SIDES, ABOUT, VERDICT, FILES, MESSAGES = range(5)  # the tables of the guide
STUDY = "experiments/modellink_pretrain/README.md"
OFF = "tracking.enabled=false"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the guide and the study name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for run in ("runs/mine", "runs/reference", "runs/study/npu"):
        folder = tmp_path / run
        folder.mkdir(parents=True)
        metrics = [
            {"train/loss": loss_at(step), "train/grad_norm": 9 + step / 100, "perf/step_time_s": 6.973}
            for step in range(1, 21)
        ]
        records = [
            {"step": n, "time": 1.0, "segment": 0, "metrics": each} for n, each in enumerate(metrics, 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
        (folder / "resolved.yaml").write_text(
            "{model: {}, hardware: {num_devices: 8, backend: npu}, dataset: {sequence_length: 4096}, "
            "task: {global_batch: 32}}"
        )
    (tmp_path / "megatron.log").write_text(lines(MODELLINK, range(1, 21)))
    (tmp_path / "trainer.log").write_text(lines(TRAINER, range(1, 21)))
    history = [{"step": n, "loss": loss_at(n)} for n in range(1, 21)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    study = tmp_path / "experiments" / "modellink_pretrain"
    study.mkdir(parents=True)
    for place in (tmp_path, study):
        shutil.copy(REPOSITORY / "experiments" / "modellink_pretrain" / "published.csv", place)
    (tmp_path / "ALPACA.txt").write_text("x")
    (tmp_path / "empty.log").write_text("")
    return tmp_path


def words_of(command: str) -> list[str]:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "bc2exp"]
    return words[3:]


def test_the_twins_have_one_shape_and_one_set_of_commands() -> None:
    assert fenced(ENGLISH) == fenced(CHINESE)
    assert shape(ENGLISH) == shape(CHINESE)
    for number, column in ((SIDES, 1), (ABOUT, 0), (VERDICT, 0), (VERDICT, 1), (MESSAGES, 0)):
        one, other = ([row[column] for row in table(name, number)] for name in GUIDES)
        assert one == other


@pytest.mark.parametrize("name", [*GUIDES, STUDY])
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


def test_every_command_of_the_guide_runs(site: Path) -> None:
    typed = commands(ENGLISH)
    assert len(typed) == 6
    for command in typed:
        assert door.command([*words_of(command), OFF]) == 0, command


def test_keys_limits_and_lines_are_those_of_the_program(site: Path) -> None:
    keys = [row[0].strip("`") for row in table(ENGLISH, ABOUT)]
    words = [f"{key}={'x' if key.endswith('row') else 8}" for key in keys]
    words += [row[1].strip("`") for row in table(ENGLISH, VERDICT) if row[1] != "–"]
    checked = preflight(
        ["task=compare", "task.a=runs/mine", "task.b=runs/mine", *words], sweep=False, folder=site
    )
    assert checked.problems == []
    limits = {
        word.partition("=")[0].rpartition(".")[2]: word.partition("=")[2] for word in words[len(keys) :]
    }
    assert {name: str(limit) for name, limit in vars(Tolerances()).items()} == limits
    report = compare(side({1: 1.0}), side({1: 1.0}), Tolerances())
    assert [row[0].strip("`") for row in table(ENGLISH, VERDICT)] == [
        line["name"] for line in report["verdict"]
    ]


def test_the_metrics_it_names_are_recorded() -> None:
    curve = {step: loss_at(step) for step in range(1, 5)}
    report = compare(
        side(curve, curve, seconds=2.0), side(dict.fromkeys(curve, 0.5), curve, seconds=1.0), Tolerances()
    )
    recorded = {name for _, values in points(report) for name in values}
    (row,) = [row for row in table(ENGLISH, FILES) if row[0] == "`metrics.jsonl`"]
    named = set(re.findall(r"`([a-z_]+/[a-z_]+)`", row[1]))
    assert len(named) == 7
    assert named <= recorded


REFUSED = [
    ["task.a=runs/mine"],
    ["task.a=runs/mien", "task.b=runs/mine"],
    ["task.a=runs", "task.b=runs/mine"],
    ["task.a=nobody", "task.b=runs/mine"],
    ["task.a=empty.log", "task.b=runs/mine"],
    ["task.a=published.csv", "task.b=runs/mine"],
    ["task.a=published.csv", "task.b=runs/mine", "task.about_a.row=x"],
    ["task.a=megatron.log", "task.b=runs/mine", "task.about_a.global_batch=8"],
    ["task.a=trainer.log", "task.b=published.csv", "task.about_b.row=npu-7b-2024-03"],
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_the_messages_are_those_that_a_person_gets(
    number: int, site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    quoted = [row[0].strip("`") for row in table(ENGLISH, MESSAGES)]
    assert len(quoted) == len(REFUSED)
    assert door.command(["task=compare", *REFUSED[number], OFF]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1].strip().removeprefix("bc2exp: ")
    pattern = ".*".join(map(re.escape, quoted[number].split("…")))
    assert re.fullmatch(pattern, told), f"{quoted[number]}\n{told}"
    assert not (site / "runs" / "compare").exists()


def test_the_figures_of_the_study_are_small() -> None:
    figures = sorted((REPOSITORY / STUDY).parent.glob("*.png"))
    assert [figure.name for figure in figures] == ["loss_error.png", "loss_overlay.png"]
    assert all(figure.stat().st_size < 100_000 for figure in figures)


def test_the_commands_of_the_study_pass_the_door(site: Path) -> None:
    runs = ("one_rank", "rehearsal")
    for name in runs:
        shutil.copytree("runs/mine", f"runs/study/{name}")
    typed = commands(STUDY)
    assert len(typed) == 6
    for command in typed:
        words = [word for word in words_of(command) if "TOKENIZER" not in word and "WEIGHTS" not in word]
        words = [word.replace("=ALPACA", "=ALPACA.txt") for word in words]
        assert preflight(words, sweep=False, folder=site).problems == [], command


def test_the_study_says_what_its_published_table_comes_to(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = [line for line in commands(STUDY) if "about_b.row=reference" in line]
    assert door.command([*words_of(command), OFF, "hydra.run.dir=found"]) == 1
    report = json.loads((site / "found" / "compare.json").read_text())
    found = {line["name"]: line["value"] for line in report["verdict"]}
    text = (REPOSITORY / STUDY).read_text("utf-8")
    assert f"{found['throughput']:.1%} below".replace("%", " %") in text
    assert f"{found['time']:.1%} above".replace("%", " %") in text
    (flagged,) = [block.strip() for block in fenced(STUDY) if "contradicts" in block]
    assert flagged in sentences(report)
    assert flagged in capsys.readouterr().out
