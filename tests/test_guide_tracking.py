"""The guide to tracking: twins, commands that run as they stand there, messages that a person gets."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from bc2exp.config.preflight import preflight
from bc2exp.launch import tracker as parent
from bc2exp.launch.run import sync_runs
from bc2exp.storage import lock
from bc2exp.tracking import follow
from tests.launch.commands import Launch, identity
from tests.pages import REPOSITORY, broken_links, commands, fenced, shape, table
from tests.tracking.parts import MemoryTracker, make_run, write_steps
from tests.tracking.servers import all_runs, free_port, only_record, served

ENGLISH, CHINESE = GUIDES = ("docs/guides/tracking.md", "docs/guides/tracking.zh.md")
RECORDED, FAULTS, MODELS, MESSAGES = range(4)


def test_the_twins_have_one_shape_and_one_set_of_commands() -> None:
    assert fenced(ENGLISH) == fenced(CHINESE)
    assert shape(ENGLISH) == shape(CHINESE)
    for number in (MODELS, MESSAGES):
        one, other = ([row[0] for row in table(name, number)] for name in GUIDES)
        assert one == other
    assert [len(table(name, FAULTS)) for name in GUIDES] == [7, 7]


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []
    assert (REPOSITORY / "docs/images/mlflow_sweep.png").stat().st_size < 300_000


def test_every_run_command_passes_the_door(tmp_path: Path) -> None:
    typed = [shlex.split(line) for line in commands(ENGLISH) if line.startswith("python -m bc2exp")]
    assert len(typed) == 7
    (tmp_path / "runs" / "alone").mkdir(parents=True)
    for words in typed:
        overrides = [word for word in words[3:] if word != "-m"]
        assert preflight(overrides, sweep="-m" in words[3:], folder=tmp_path).problems == [], words


def told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages of the table, in its order, each as the program gives it."""
    found = []

    def last() -> str:
        captured = capsys.readouterr()
        return (captured.err + captured.out).strip().splitlines()[-1].removeprefix("bc2exp: ")

    uri = "http://127.0.0.1:9"
    folder = make_run(tmp_path, "a", uri)
    (folder / "logs").mkdir()
    write_steps(folder, 1, 1, end="done")

    class Gone:
        """A parent that waits once, then ends."""

        words = iter([None, None, "close"])

        def wait(self, seconds: float) -> str | None:
            return next(self.words)

    def reject(run, live):
        number = (
            "its experiment 'pretrain' (id 1) is deleted; restore it with `mlflow experiments restore -x 1`"
        )
        raise follow.Refused(number)

    away = MemoryTracker(fail_after=0)
    follow.follow(folder, away.connect, 0.0, Gone())
    found += [line.removeprefix("bc2exp: ") for line in capsys.readouterr().err.splitlines()]
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(parent, "_command", lambda *_: command)
    monkeypatch.setattr(parent, "_GRACE_SECONDS", 0.0)
    found.append(parent.Tracker(folder, 0.0).close(lambda: False))
    found.append(parent.Tracker(folder, 60.0).close(lambda: True))
    follow.sync([folder], reject, 0.0)
    found.append(last())
    other = make_run(tmp_path, "b", uri, tracking={"enabled": False})
    with lock.hold(folder / "owner.lock"):
        plain = {"task": {"run": None}, "tracking": {"uri": None, "patience_s": 0.0}}
        sync_runs(plain, tmp_path)
        found.append(last())
        follow.sync([folder], away.connect, 0.0)
        found.append(last())
    with pytest.raises(UserError) as error:
        sync_runs({**plain, "task": {"run": str(other.parent)}}, tmp_path)
    found.append(str(error.value))
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    for word in ("tracking.uri=runs.db", "tracking.run_name=hf_of_somebody"):
        found += preflight([word], sweep=False, folder=tmp_path).problems
    return found


def test_the_messages_are_those_that_a_person_gets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = told(tmp_path, capsys, monkeypatch)
    quoted = [row[0].strip("`") for row in table(ENGLISH, MESSAGES)]
    assert len(given) == len(quoted)
    for pattern, message in zip(quoted, given, strict=True):
        assert re.match(".*".join(map(re.escape, pattern.split("…"))), message), f"{pattern}\n{message}"


@pytest.mark.slow
def test_the_commands_do_what_they_say_one_after_the_other(tmp_path: Path) -> None:
    """With the small training's words; MLflow's own commands on free ports. The sweep is made by
    tests/launch/test_in_a_browser.py."""
    launch, port = Launch(tmp_path / "launch"), str(free_port())
    (train, ui), _, (server, to_server), offline = (
        block.splitlines()[1:] for block in fenced(ENGLISH, "bash")
    )
    database = f"sqlite:///{launch.folder}/mlflow.db"

    def run(command: str):
        words = [word.replace(":5000", f":{port}") for word in shlex.split(command)[3:]]
        tracked = [] if "tracking.enabled=false" in words else ["tracking.enabled=true"]
        small = launch.run(*words, *tracked)
        return small.out.splitlines()

    try:
        assert run(train)[-1] == f"mlflow   {ui} --backend-store-uri {database}"
        with served(launch.folder, *shlex.split(ui)[1:]) as page:  # a bare `mlflow ui` in the same folder
            assert [each.info.status for each in all_runs(page)] == ["FINISHED"]
        words = [word for word in shlex.split(server)[1:] if word not in ("--port", "5000")]
        with served(launch.folder, *words, port=int(port)) as address:
            assert run(to_server)[-1].startswith(f"mlflow   {address}/#/experiments/")
            lines = [run(command)[-1] for command in offline]
            alone = launch.folder / "runs" / "alone"
            assert "mlflow" not in lines[0]
            assert lines[1].startswith(
                "sync: 2 run folders recorded; left out: 1 with tracking.enabled=false"
            )
            assert lines[2:] == ["sync: 1 run folder recorded"] * 2
            assert len(all_runs(address)) == 2
            for place in (database, address):
                assert only_record(place, identity(alone)).info.status == "FINISHED"
            assert json.loads((alone / "tracking.json").read_text())["uri"] == address
    finally:
        launch.close()
