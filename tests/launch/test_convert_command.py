"""`task=convert` as a person types it: what the screen and the folder show."""

from __future__ import annotations

import json

from tests.launch.commands import events
from tests.weights.folders import published, tensors_of


def test_a_conversion_from_the_command_to_the_report(launch):
    _, folder = published(launch.folder / "hf")
    words = ("task=convert", "task.source=hf", "task.format=megatron", "task.tensor=8")
    words = (*words, "task.vocab_divisible_by=8")
    # no device of the hardware is needed, however many it has
    command = launch.run(*words, "task.target=shards", "task.verify=true", "hardware=8cpu")
    run = launch.only_run()
    report = json.loads((run / "conversion.json").read_text())
    assert (report["files"], report["format"], report["nan"]) == (8, "megatron", [])
    assert "writing" in command.out
    assert "every bit is right" in command.out
    assert "weights  shards" in command.out
    assert {event["stage"] for event in events(run, "converting")} == {"convert", "verify"}
    assert json.loads((run / "summary.json").read_text())["outcome"] == "done"
    launch.run("task=convert", "task.source=shards", "task.target=back")
    for name, value in tensors_of(launch.folder / "back").items():
        assert bool((tensors_of(folder)[name] == value).all())
    assert (
        "task.target=back: exists already"
        in launch.run("task=convert", "task.source=shards", "task.target=back", code=2).err
    )
    (launch.folder / "hf" / "model.safetensors.index.json").unlink()
    next((launch.folder / "hf").glob("*.safetensors")).write_bytes(b"\xff" * 100)
    refused = launch.run(*words, "task.target=other", code=2)
    assert "cannot be read: its header claims" in refused.err
    assert not (launch.folder / "other").exists()
