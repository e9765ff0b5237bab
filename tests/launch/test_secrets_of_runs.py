"""Trainings in an environment full of secrets: not one of them is in what they print or leave behind."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from tests.launch.commands import STEPS, identity
from tests.tracking.servers import Proxy, mlflow_server, only_record

SECRETS = {
    "HF_TOKEN": "hf_5ecretOfTheHub",
    "AWS_SECRET_ACCESS_KEY": "aws5ecret/Key+",
    "MLFLOW_TRACKING_TOKEN": "mlflow5ecretToken",
    "WANDB_API_KEY": "wandb5ecretKey",
    "DATABASE_PASSWORD": "database5ecret",
}
USER, PASSWORD = "alice", "wonder5ecret@land"
ALL = (*SECRETS.values(), PASSWORD, "wonder5ecret")

RAISE = """
from bc2exp.train.trainer import Trainer
def evaluate(self, step):
    raise RuntimeError("no answer from https://bob:bobs5ecret@hub with " + os.environ["HF_TOKEN"])
Trainer._evaluate = evaluate
"""


@pytest.fixture
def secret(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def found_in(*folders: Path) -> list[tuple[str, str]]:
    """(file, secret) of every file below the folders that holds one."""
    words = [text.encode() for text in (*ALL, "bobs5ecret")]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert files
    return [
        (str(file), word.decode()) for file in files for word in words if word in file.read_bytes()
    ]  # databases and logs, too


def test_a_run_that_fails_beside_a_tracker_that_is_away(launch, secret):
    """Address, key and password are in the traceback, in the tracker's complaint, on the command line."""
    uri = f"tracking.uri=http://{USER}:{PASSWORD}@127.0.0.1:9"
    command = launch.run(*STEPS, "tracking.enabled=true", "tracking.patience_s=0", uri, inject=RAISE, code=1)
    assert "RuntimeError: no answer from https://***@hub with ***" in command.err
    assert "the tracker at http://127.0.0.1:9 could not be reached" in command.err
    run = launch.only_run()
    assert json.loads((run / "run.json").read_text())["tracking"]["uri"] == "http://127.0.0.1:9"
    assert "tracking.uri='http://127.0.0.1:9'" in (run / "overrides.txt").read_text().splitlines()
    assert found_in(launch.folder, launch.aside / "out-0", launch.aside / "err-0") == []
    for text in (command.out, command.err):
        assert [word for word in ALL if word in text] == []


def authorized(proxy: Proxy) -> bool:
    """Whether every request bore name and password."""
    wanted = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    return bool(proxy.headers) and {each.get("Authorization") for each in proxy.headers} == {wanted}


@pytest.mark.slow
def test_a_server_with_a_password(launch, secret, tmp_path, monkeypatch):
    """A sweep whose address has the password, a training that finds it in the environment, both recorded."""
    (tmp_path / "server").mkdir()
    with mlflow_server(tmp_path / "server") as server:
        proxy = Proxy(server).open()
        address = proxy.address.replace("http://", f"http://{USER}:{PASSWORD.replace('@', '%40')}@")
        tracked = ("tracking.enabled=true", "task.steps=2")
        sweep = launch.run("-m", *tracked, f"tracking.uri={address}", "seed=1")
        assert authorized(proxy)
        monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
        monkeypatch.setitem(os.environ, "MLFLOW_TRACKING_USERNAME", USER)
        monkeypatch.setitem(os.environ, "MLFLOW_TRACKING_PASSWORD", PASSWORD)
        proxy.headers.clear()
        single = launch.run(*tracked, f"tracking.uri={proxy.address}", "seed=3")
        assert authorized(proxy)
        for run in [*launch.runs(), *launch.folder.glob("runs/sweep/*/*/")]:
            if (run / "run.json").is_file():
                record = only_record(server, identity(run))
                assert record.info.status == "FINISHED"
        page = f"{proxy.address}/#/experiments/{record.info.experiment_id}/runs/"
        for command in (sweep, single):
            assert command.out.splitlines()[-1].startswith(f"mlflow   {page}")
        proxy.away()
    assert found_in(launch.folder, launch.aside, tmp_path / "server") == []
