"""`task=prepare` as a person types it: what the screen, the folder and MLflow show."""

from __future__ import annotations

import json

from bc2exp.data.store import TokenStore
from bc2exp.tracking import mlflow as tracker
from tests.launch.commands import events

TRACKED = "tracking.enabled=true"


def test_a_preparation_from_the_command_to_mlflow(launch):
    (launch.folder / "orders.csv").write_text(
        'label,review\n1,"很好, 很快"\n0,冷了\n1,\n1,hot\n', encoding="utf-8"
    )
    words = ("task=prepare", "dataset=text", "dataset.path=orders.csv", "dataset.column=review", TRACKED)
    # no device of the hardware is needed, however many it has
    command = launch.run(*words, "hardware=8cpu")
    run = launch.only_run()
    report = json.loads((run / "report.json").read_text())
    assert (report["rows"], report["documents"], report["empty"]) == (4, 3, 1)
    assert TokenStore(report["store"]).num_documents == 3
    assert str(launch.folder / "runs" / "prepared") in report["store"]
    assert len(list((run / "logs").glob("rank-*.log"))) == 1
    for shown in (
        "documents",
        "dropped, empty",
        "store    runs/prepared/text-",
        "tokens.bin and .idx",
        "lengths.png",
    ):
        assert shown in command.out
    assert json.loads((run / "summary.json").read_text())["data"] == report
    assert [event["documents"] for event in events(run, "data")] == [3]

    client = tracker.MlflowClient(f"sqlite:///{launch.folder}/mlflow.db")
    (record,) = client.search_runs([client.get_experiment_by_name("prepare").experiment_id])
    assert record.info.status == "FINISHED"
    assert record.data.metrics["data/tokens"] == report["tokens"]
    assert [given.dataset.name for given in record.inputs.dataset_inputs] == ["text"]
    stored = {file.path for file in client.list_artifacts(record.info.run_id)}
    assert {"report.json", "lengths.png", "summary.json"} <= stored


def test_a_file_that_cannot_be_prepared_is_a_wrong_configuration(launch):
    (launch.folder / "orders.csv").write_text("label,review\n1,hot and very hot\n")
    words = ("task=prepare", "dataset=text", "dataset.path=orders.csv")
    assert "has no such column; it has label, review" in launch.run(*words, "dataset.column=text", code=2).err
    command = launch.run(
        *words, "dataset.column=review", "dataset.max_row_bytes=15", "dataset.max_bad_rows=0", code=2
    )
    assert "orders.csv row 1 (longer than max_row_bytes)" in command.err
    assert not list((launch.folder / "runs" / "prepared").glob("*/tokens.bin"))
