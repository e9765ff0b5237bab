"""The replay into a real MLflow server, with faults between the two: no gap, no duplicate, one run."""

from __future__ import annotations

import json

import pytest

from bc2exp.tracking import follow
from bc2exp.tracking import mlflow as tracker
from bc2exp.tracking.journal import Journal
from tests.tracking.servers import Proxy, all_runs, history, journalled, mlflow_server, models, only_record


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture
def proxy(server):
    proxy = Proxy(server).open()
    yield proxy
    proxy.away()


@pytest.fixture
def folder(make_run, tmp_path, proxy, write_steps, request):
    """A run that is over, recorded nowhere yet."""
    place = {"artifact_location": None, "experiment": request.node.name}
    folder = make_run(tmp_path, "a", proxy.address, tracking=place)
    write_steps(folder, 1, 30)
    with Journal(folder / "metrics.jsonl", 1) as journal:
        for step in (10, 20):
            journal.event("checkpoint", step=step, path=f"checkpoints/step-{step:08}")
    (folder / "checkpoints" / "step-00000020").mkdir(parents=True)
    write_steps(folder, 29, 40, segment=2, end="done")
    return folder


def identity(folder):
    return json.loads((folder / "run.json").read_text())["id"]


def sync(folder):
    return tracker.main(["--sync", "--patience", "0", str(folder)])


def whole(server, folder):
    """The only record, which is finished and holds exactly what the journal does."""
    record = only_record(server, identity(folder))
    assert history(server, record.info.run_id) == journalled(folder)
    assert record.info.status == "FINISHED"
    expected = journalled(folder)
    for step, model in zip((10, 20), models(server, record), strict=True):
        assert model.name == f"step-{step:08}"
        values = {metric.key: (metric.step, repr(metric.value), metric.timestamp) for metric in model.metrics}
        assert len(model.metrics) == len(values)
        assert values == {name: points[step - 1] for name, points in expected.items()}
        assert model.status == "READY"
        assert model.tags["bc2exp.state"] == ("there" if step == 20 else "missing")
    return record


def test_a_run_over_http_is_recorded_with_its_files(server, folder):
    assert sync(folder) == follow.DONE
    record = whole(server, folder)
    assert record.info.artifact_uri.startswith("mlflow-artifacts:/")
    client = tracker.MlflowClient(server)
    names = {file.path for file in client.list_artifacts(record.info.run_id)}
    assert names == {"resolved.yaml", "overrides.txt", "metrics.jsonl", "differences.jsonl"} & names
    assert {"resolved.yaml", "overrides.txt", "metrics.jsonl"} <= names
    assert len(journalled(folder)["train/loss"]) == 40


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["error", "lost"])
def test_a_server_that_fails_at_one_request_after_the_other(server, folder, proxy, mode, monkeypatch, capsys):
    """Whether it had done what it was asked or not: begun again often enough, the record is whole."""
    count, failing = 0, 1
    treat = proxy.treat

    def one_of_them(*request):
        nonlocal count
        count += 1
        proxy.mode = mode if count == failing else "pass"
        return treat(*request)

    monkeypatch.setattr(proxy, "treat", one_of_them)
    codes = [sync(folder)]
    while count >= failing:
        count, failing = 0, failing + 1
        codes.append(sync(folder))
    assert codes[-1] == follow.DONE
    assert codes.count(follow.UNREACHED) > 10, "each of the requests failed once"
    assert "could not be reached (ResponseError('too many 500 error responses'))" in capsys.readouterr().err
    whole(server, folder)


def test_a_server_without_logged_models_records_the_rest(server, folder, proxy, monkeypatch):
    """As they were before MLflow 3: they do not know the address."""
    treat = proxy.treat

    def older(method, path, *rest):
        return (404, [], b"") if "/logged-models" in path else treat(method, path, *rest)

    monkeypatch.setattr(proxy, "treat", older)
    assert sync(folder) == follow.DONE
    record = only_record(server, identity(folder))
    assert (record.info.status, models(server, record)) == ("FINISHED", [])
    assert history(server, record.info.run_id) == journalled(folder)
    assert record.data.tags["bc2exp.checkpoints"] == "not recorded: this server has no logged models"


def test_a_store_of_files_that_refuses_keeps_no_number_back(server, folder, proxy, monkeypatch, capsys):
    treat = proxy.treat

    def closed(method, path, *rest):
        return (403, [], b"not yours") if "/mlflow-artifacts/" in path else treat(method, path, *rest)

    monkeypatch.setattr(proxy, "treat", closed)
    assert sync(folder) == follow.UNREACHED
    assert "403" in capsys.readouterr().err
    record = whole(server, folder)
    assert json.loads((folder / "tracking.json").read_text())["status"] == "RUNNING", "it is not over"
    monkeypatch.setattr(proxy, "treat", treat)
    assert sync(folder) == follow.DONE
    assert tracker.MlflowClient(server).list_artifacts(record.info.run_id)


@pytest.mark.parametrize("held", ["/runs/create", "/logged-models"])
def test_a_request_that_arrives_after_everybody_gave_it_up(server, folder, proxy, held, monkeypatch):
    """What it began was begun a second time, by the request made instead of it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    treat = proxy.treat

    def hold_the_creation(method, path, *rest):
        proxy.mode = "late" if method == "POST" and path.endswith(held) else "pass"
        return treat(method, path, *rest)

    monkeypatch.setattr(proxy, "treat", hold_the_creation)
    assert sync(folder) == follow.UNREACHED
    monkeypatch.setattr(proxy, "treat", treat)
    proxy.mode = "pass"
    assert sync(folder) == follow.DONE
    record = whole(server, folder)
    proxy.deliver()
    mine = [run for run in all_runs(server) if run.data.tags.get("bc2exp.run") == identity(folder)]
    assert len(mine) + len(models(server, record)) == 4, "one of them twice"
    assert sync(folder) == follow.DONE
    assert whole(server, folder).info.run_id == record.info.run_id
