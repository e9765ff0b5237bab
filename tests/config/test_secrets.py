"""Addresses without their passwords, texts without their secrets."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from bc2exp.config import secrets
from bc2exp.config.load import finalize
from bc2exp.config.preflight import preflight
from bc2exp.launch.record import tracking_record
from tests.pages import REPOSITORY


@pytest.fixture(autouse=True)
def nothing_withdrawn(monkeypatch):
    monkeypatch.setattr(secrets, "_whole", {})


BARE = [
    ("http://me:word@host:5000", "http://host:5000"),
    ("https://token@host/a/b?x=1", "https://host/a/b?x=1"),
    ("postgresql+psycopg2://me:p@ss:w@db.here:5432/mlflow", "postgresql+psycopg2://db.here:5432/mlflow"),
    ("postgresql://db/mlflow?user=me&password=word&sslmode=require", "postgresql://db/mlflow?user=me&sslmode=require"),
    ("mssql+pyodbc:///?odbc_connect=DRIVER%3D;PWD%3Dword", "mssql+pyodbc:///"),
    ("sqlite:////home/me@work/a?b#c.db", "sqlite:////home/me@work/a?b#c.db"),
    ("http://host:5000", "http://host:5000"),
    ("databricks", "databricks"),
]  # fmt: skip


@pytest.mark.parametrize(("uri", "expected"), BARE)
def test_an_address_without_what_is_secret(uri, expected):
    assert secrets.bare(uri) == expected
    assert secrets.withdraw(uri) == expected
    assert secrets.whole(expected, {}) == uri


def test_the_address_of_the_environment_is_found_again():
    environment = {"MLFLOW_TRACKING_URI": "http://me:other@elsewhere:1"}
    assert secrets.whole("http://elsewhere:1", environment) == "http://me:other@elsewhere:1"
    assert secrets.whole("http://elsewhere:2", environment) == "http://elsewhere:2"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("tracking.uri=http://me:word@a", "tracking.uri=http://a"),
        ("++tracking.uri='http://me:w,ord@a'", "++tracking.uri='http://a'"),
        ("tracking.uri=http://me:word@a,https://you:sword@b", "tracking.uri=http://a,https://b"),
        ("tracking.uri=null", "tracking.uri=null"),
        ("dataset.path=s3://me@here", "dataset.path=s3://me@here"),
    ],
)
def test_the_words_of_a_command_line(word, expected):
    assert secrets.withdraw_from([word]) == [expected]


def test_texts_are_told_without_secrets():
    environment = {
        "HF_TOKEN": "hf_abcdefgh",
        "AWS_SECRET_ACCESS_KEY": "aws/secret+",
        "MY_API_KEY": "k" * 9,
        "DB_PWD": "swordfish",
        "MLFLOW_TRACKING_URI": "http://me:lo%2Fng-one@host",
        "TOKENIZERS_PARALLELISM": "parallel",
        "PWD": "/home/me",
        "HF_TOKEN_PATH": "/home/me/token",
        "SHORT_TOKEN": "abc",
    }
    text = (
        "at http://you:pw@host/x?token=abc&y=1, hf_abcdefgh aws/secret+ kkkkkkkkk swordfish lo%2Fng-one "
        "lo/ng-one parallel /home/me/token abc a@b"
    )
    assert secrets.hide(text, environment) == (
        "at http://***@host/x?token=***&y=1, *** *** *** *** *** *** parallel /home/me/token abc a@b"
    )


def test_a_stream_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    inner = io.StringIO()
    stream = secrets.hiding(inner)
    print("the key is hf_abcdefgh", file=stream, flush=True)
    assert inner.getvalue() == "the key is ***\n"
    assert not stream.isatty()
    assert secrets.hiding(None) is None


def test_a_password_in_a_file_or_in_the_environment_is_not_recorded(tmp_path: Path, monkeypatch):
    (tmp_path / "experiments" / "mine").mkdir(parents=True)
    file = tmp_path / "experiments" / "mine" / "one.yaml"
    file.write_text("# @package _global_\ntracking:\n  uri: http://me:${oc.env:WORD}@host:5000\n")
    monkeypatch.setenv("WORD", "a-password")
    checked = preflight(["experiments=mine/one"], sweep=False, folder=tmp_path)
    assert checked.problems == []
    plain = finalize(checked.jobs[0], tmp_path)
    assert plain["tracking"]["uri"] == "http://host:5000"
    assert secrets.whole("http://host:5000", {}) == "http://me:a-password@host:5000"
    plain["tracking"]["uri"] = None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://you:b-password@other")
    assert tracking_record(plain, tmp_path)["uri"] == "http://other"


def test_a_secret_in_the_configuration_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    checked = preflight(["tracking.run_name=run-hf_abcdefgh"], sweep=False, folder=tmp_path)
    assert checked.problems == [
        "tracking.run_name: holds the value of $HF_TOKEN, a secret, and the configuration is recorded; "
        "leave it out"
    ]


def test_an_address_that_is_none_is_told_without_its_password(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://me:a-password@host")
    (problem,) = preflight([], sweep=False, folder=tmp_path).problems
    assert problem.startswith("MLFLOW_TRACKING_URI=ftp://host: not an address MLflow keeps runs at; ")


def test_a_traceback_is_printed_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    code = (
        "import os, sys; from bc2exp.config.secrets import hiding; sys.stderr = hiding(sys.stderr); "
        "raise RuntimeError('at http://me:word@host with ' + os.environ['HF_TOKEN'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "RuntimeError: at http://***@host with ***"
