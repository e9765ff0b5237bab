"""What a run folder says of how it came about."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from datetime import datetime

import pytest

from bc2exp import __version__
from bc2exp.config.load import digest, read
from bc2exp.launch import record
from bc2exp.launch.folder import RunFolder, claim
from bc2exp.launch.record import git_state, tracking_record, write_record
from bc2exp.storage.lock import hold
from tests.small_run import small_plain

NOW = datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(*words): the record of a new run with these words; (folder, content of run.json)."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def write(*words):
        plain = small_plain(tmp_path, *words)
        folder = claim(plain, tmp_path, None, NOW)
        with folder.lock:
            return folder.path, write_record(folder, plain, list(words), tmp_path, {"study": "a"})

    return write


def again(path, plain, launch_folder):
    with hold(path / "owner.lock") as lock:
        return write_record(RunFolder(path, lock, True), plain, ["seed=1"], launch_folder, {})


def test_the_record_of_a_new_run(write, tmp_path):
    path, run = write("task.steps=7", "model.tokenizer=null")
    assert json.loads((path / "run.json").read_text()) == run
    assert len(run["id"]) == 32
    assert run["name"].startswith("tiny_7b-cpu-single-2")
    assert run["task"] == "pretrain"
    assert run["digest"] == digest(small_plain(tmp_path, "task.steps=7")) == path.name.rpartition("-")[2]
    assert run["launch_folder"] == str(tmp_path)
    assert run["tags"]["study"] == "a"
    assert set(run["tags"]) == {"git.commit", "study"}
    assert (path / "overrides.txt").read_text() == "task.steps=7\nmodel.tokenizer=null\n"
    assert read(path / "resolved.yaml").task.steps == 7


def test_text_survives_the_resolved_configuration(write, tmp_path):
    file = tmp_path / "外卖: 1e3 # 'x'.txt"
    file.write_text("好吃\n")
    path, _ = write("dataset=text", f"dataset.path={file}", "tracking.run_name=1e3")
    config = read(path / "resolved.yaml")
    assert config.dataset.path == str(file)
    assert config.tracking.run_name == "1e3"


def test_the_environment_names_the_packages(write):
    path, _ = write()
    environment = json.loads((path / "environment.json").read_text())
    assert {"torch", "mlflow", "hydra-core"} <= set(environment["packages"])
    assert environment["python"].startswith("3.")


def test_the_environment_names_the_variables_of_the_devices(write, monkeypatch):
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "600")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "1")
    monkeypatch.setenv("SOME_PASSWORD", "secret")
    path, _ = write("hardware=1npu", "hardware.rehearsal=true", "model=tiny_7b")
    text = (path / "environment.json").read_text()
    variables = json.loads(text)["variables"]
    assert variables["HCCL_CONNECT_TIMEOUT"] == "600"  # the person's
    assert variables["HCCL_EXEC_TIMEOUT"] == "1500"  # ours
    assert variables["ASCEND_RT_VISIBLE_DEVICES"] == "0,1"
    assert variables["TASK_QUEUE_ENABLE"] == "0"  # a rehearsal's, whatever is set
    assert "secret" not in text
    path, _ = write("hardware=cpu")
    variables = json.loads((path / "environment.json").read_text())["variables"]
    assert variables["OMP_WAIT_POLICY"]
    assert not [name for name in variables if name.startswith(("HCCL", "ASCEND"))]


def test_a_resumed_run_keeps_who_it_is_and_takes_what_it_does_now(write, tmp_path):
    path, run = write("task.steps=7")
    plain = small_plain(tmp_path, "task.steps=9", "tracking.enabled=true")
    resumed = again(path, plain, tmp_path / "elsewhere")
    for key in ("id", "name", "created", "launch_folder", "tags", "task"):
        assert resumed[key] == run[key]
    assert resumed["digest"] == digest(plain) != run["digest"]
    assert resumed["tracking"] == {**run["tracking"], "enabled": True}
    assert read(path / "resolved.yaml").task.steps == 9
    assert (path / "overrides.txt").read_text() == "seed=1\n"
    assert json.loads((path / "run.json").read_text()) == resumed


def test_addresses_are_absolute(tmp_path, monkeypatch):
    plain = small_plain(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here = tracking_record(plain, tmp_path)
    assert here["uri"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert here["artifact_location"] == f"{tmp_path}/mlartifacts/pretrain"
    assert here["experiment"] == "pretrain"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_record(plain, tmp_path)["uri"] == "http://server:5000"
    assert tracking_record(plain, tmp_path)["artifact_location"] is None
    named = small_plain(tmp_path, "tracking.uri=sqlite:////data/x.db", "tracking.experiment=百川")
    assert tracking_record(named, tmp_path)["uri"] == "sqlite:////data/x.db"
    assert tracking_record(named, tmp_path)["experiment"] == "百川"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, in a folder of the test's own."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    root = tmp_path / "repository"
    root.mkdir()

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", root, *who, *words], check=True, capture_output=True)

    git("init", "-b", "main")
    (root / "file").write_text("one\n")
    git("add", "file")
    git("commit", "-m", "first")
    return root


def test_a_clean_checkout(repository):
    state = git_state(repository)
    assert len(state["commit"]) == 40
    assert (state["branch"], state["status"], state["diff"]) == ("main", "", None)
    assert state["version"] == __version__


def test_a_changed_checkout(repository):
    (repository / "file").write_text("two\n")
    (repository / "new").write_text("")
    state = git_state(repository)
    assert state["status"] == " M file\n?? new"
    assert state["diff"].endswith("-one\n+two\n")


def test_the_diff_is_a_file_of_its_own_and_goes_with_its_reason(repository, write, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "checkout", lambda: repository)
    (repository / "file").write_text("two\n")
    path, run = write()
    assert "+two" in (path / "git.diff").read_text()
    state = json.loads((path / "git.json").read_text())
    assert state["commit"] == run["tags"]["git.commit"]
    assert "diff" not in state
    (repository / "file").write_text("one\n")
    again(path, small_plain(tmp_path), tmp_path)
    assert not (path / "git.diff").exists()


def test_without_a_checkout_or_without_git_there_is_the_version(repository, monkeypatch, tmp_path):
    assert git_state(None) == git_state(tmp_path) == {"commit": None, "version": __version__}
    monkeypatch.setenv("PATH", "")
    assert git_state(repository)["commit"] is None
