"""The guide to sweeps: twins whose commands run, in the order of the page, with jobs that only write a
journal; its tables say what the program does, its messages are those that a person gets."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest

from bc2exp import __main__ as door
from bc2exp.config.errors import UserError
from bc2exp.config.preflight import Preflight, preflight
from bc2exp.config.sweep import SweepConfig
from bc2exp.launch import ledger as states
from bc2exp.launch import sweep_door
from bc2exp.launch.sbatch import SBATCH
from bc2exp.storage.lock import hold
from bc2exp.tracking.journal import Journal, last_segment
from tests.pages import broken_links, commands, fenced, shape, table

ENGLISH, CHINESE = GUIDES = ("docs/guides/sweeps.md", "docs/guides/sweeps.zh.md")
FILES, KEYS, STATUSES, MESSAGES = range(4)  # the tables of the guide
OFF = "tracking.enabled=false"
TYPED = [line for line in commands(ENGLISH) if line.startswith("python")]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which jobs end at once; one of learning rate 2e-3 is worse."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def end(folder, plain, overrides, launch_folder, tags, conversation):  # type: ignore[no-untyped-def]
        path = folder.path / "metrics.jsonl"
        with Journal(path, last_segment(path) + 1) as journal:
            (folder.path / "run.json").write_text("{}")
            journal.metrics(1, {"eval/loss": plain["task"]["optimizer"]["lr"], "train/loss": 1.0})
            journal.event("done")
        return 0

    monkeypatch.setattr(sweep_door, "run_on_ranks", end)
    return tmp_path


def words_of(command: str) -> list[str]:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "bc2exp"]
    return words[3:]


def ranking(folder: Path) -> dict[int, tuple[str, float | None]]:
    jobs = json.loads((folder / "sweep.json").read_text())["jobs"]
    return {job["number"]: (job["status"], job["value"]) for job in jobs}


def test_the_twins_have_one_shape_and_one_set_of_commands() -> None:
    assert fenced(ENGLISH) == fenced(CHINESE)
    assert shape(ENGLISH) == shape(CHINESE)
    for number in (KEYS, STATUSES, MESSAGES):
        one, other = ([row[0] for row in table(name, number)] for name in GUIDES)
        assert one == other


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


def test_every_command_of_the_guide_runs(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(TYPED) == 8
    start, layouts, resume, again, corners, optuna, array, rank = TYPED

    def run(command: str, code: int = 0) -> str:
        words = words_of(command)
        more = [] if any(word.startswith("sweep.resume=") for word in words) else [OFF]
        assert door.command([*words, *more]) == code, command
        return capsys.readouterr().out

    run(start)
    (first,) = site.glob("runs/sweep/*")
    assert list(ranking(first).values()) == [("done", 1e-3)] * 2 + [("done", 2e-3)] * 2
    for name in re.findall(r"`([\w./]+)`", " ".join(row[0] for row in table(ENGLISH, FILES))):
        assert (first / name).exists(), name
    run(layouts)
    for command in (resume, again):
        assert "job 0 of" not in run(command)
    assert {status for status, _ in ranking(site / "runs" / "layouts").values()} == {"done"}
    (quoted,) = [line for block in fenced(ENGLISH) for line in block.splitlines() if "infeasible:" in line]
    assert f"{quoted}\n" in run(corners)
    run(array)
    assert (site / "runs" / "array" / SBATCH).is_file()
    assert {status for status, _ in ranking(site / "runs" / "array").values()} == {"waiting"}
    assert f"sbatch runs/array/{SBATCH}" in commands(ENGLISH)
    run(rank)
    assert {status for status, _ in ranking(site / "runs" / "array").values()} == {"done"}
    run(optuna, 0 if importlib.util.find_spec("optuna") else 2)


def test_keys_and_statuses_are_those_of_the_program() -> None:
    keys = {row[0].strip("`").removeprefix("sweep.") for row in table(ENGLISH, KEYS)}
    assert keys == set(vars(SweepConfig())) - {"resume", "sbatch", "job"}
    rows = {row[0].strip("`"): row[2] for row in table(ENGLISH, STATUSES)}
    known = (states.WAITING, states.STARTED, states.STOPPED, states.FAILED, *states.OVER)
    assert set(rows) == set(known)
    assert {status for status, done in rows.items() if done == "left alone"} == set(states.OVER)


LR = "task.optimizer.lr=1e-3,2e-3"
REFUSED: list[list[str]] = [
    ["-m", "hardware.memory_gib=1e-5", "seed=1,2"],
    ["sweep.resume=runs/nobody"],
    ["sweep.resume=runs"],
    ["-m", LR, "hydra.sweep.dir=s"],
    ["sweep.resume=s", "seed=5"],
    ["sweep.resume=s"],
    ["sweep.resume=s"],
    ["sweep.resume=s"],
    ["sweep.resume=u"],
    ["-m", "task.optimizer.lr=interval(1e-3,2e-3)"],
    ["-m", "hydra/launcher=joblib", LR],
    ["-m", "hydra/sweeper=optuna", LR, "sweep.sbatch=true"],
]


def told(words: list[str], site: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The first line with which a command line is refused."""
    capsys.readouterr()
    if "hydra/sweeper=optuna" in words:  # as if it were installed
        rest = [word for word in words if word not in ("-m", "hydra/sweeper=optuna")]
        checked = preflight(rest, sweep=True, folder=site)
        with pytest.raises(UserError) as refused:
            sweep_door.start_sweep(site, Preflight([*words[1:]], checked.jobs), words)
        return str(refused.value)
    assert door.command(words) == 2
    # what loggers of libraries say to a stream of another test's comes before
    said = capsys.readouterr().err
    lines = [line.strip() for line in said[said.index("bc2exp: ") :].splitlines()]
    return next(text for line in lines if " mistake" not in (text := line.removeprefix("bc2exp: ")))


def test_the_messages_are_those_that_a_person_gets(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quoted = [row[0].strip("`") for row in table(ENGLISH, MESSAGES)]
    assert len(quoted) == len(REFUSED)
    assert door.command(["-m", LR, "hydra.sweep.dir=s", OFF]) == 0
    (site / "u").mkdir()
    (site / "u" / "ledger.jsonl").write_text("")
    (site / "runs").mkdir()
    snapshot = site / "s" / "jobs" / "0.yaml"
    whole = snapshot.read_text()
    locks = {6: site / "s" / "owner.lock", 7: site / "s" / "jobs" / "1.lock"}
    for number, words in enumerate(REFUSED):
        snapshot.write_text(whole.replace("seed: 42", "seed: 43") if number == 5 else whole)
        with hold(locks[number]) if number in locks else nullcontext():
            said = told(words, site, capsys)
        pattern = ".*".join(map(re.escape, quoted[number].split("…")))
        assert re.fullmatch(pattern, said), f"{quoted[number]}\n{said}"
