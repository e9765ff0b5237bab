"""Run folders as the parent leaves them, and a tracker that forgets nothing and can be away."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from bc2exp.tracking.journal import Journal


class MemoryTracker:
    """A tracker in memory: `held` is what it keeps. After `fail_after` calls it is away."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.held: list[tuple[str, int, float]] = []
        self.tagged: dict[str, str] = {}
        self.datasets: list[str] = []
        self.models: dict[str, tuple[str, dict[str, float]]] = {}
        self.files: list[str] = []
        self.status = "NONE"
        self.opened = 0
        self.run = None
        self.fail_after = fail_after

    def connect(self, run, live):
        self._call()
        self.opened += 1
        self.run = run
        if live or self.status == "NONE":
            self.status = "RUNNING"
        return self

    @property
    def description(self):
        return {"run_id": "1", "experiment_id": "1", "uri": self.run.uri, "status": self.status}

    def log(self, points):
        for point in points:
            self._call()
            if (point.name, point.step) not in {(name, step) for name, step, _ in self.held}:
                self.held.append((point.name, point.step, point.value))

    def data(self, record):
        self._call()
        self.datasets.append(record["name"])

    def checkpoints(self, checkpoints):
        self._call()
        for checkpoint, points in checkpoints:
            values = {point.name: point.value for point in points}
            self.models[checkpoint.name] = (checkpoint.state, values)

    def tags(self, tags):
        self._call()
        self.tagged.update(tags)

    def artifacts(self):
        self._call()
        self.files = sorted(path.name for path in self.run.folder.iterdir() if path.is_file())

    def end(self, status, time):
        self._call()
        self.status = status

    def _call(self):
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise ConnectionError("nobody answers\nand a second line")


def make_run(launch: Path, name: str = "a", uri: str = "memory", **fields) -> Path:
    """A run folder: its name, the tracker's address, and other fields of run.json."""
    folder = launch / "runs" / "pretrain-tiny_7b" / name
    folder.mkdir(parents=True)
    tracking = {
        "enabled": True,
        "uri": uri,
        "experiment": "pretrain",
        "artifact_location": str(launch / "mlartifacts" / "pretrain"),
        **fields.pop("tracking", {}),
    }
    values = {
        "id": uuid.uuid4().hex,
        "name": f"tiny_7b-cpu-single-{name}",
        "task": "pretrain",
        "digest": "0123abcd",
        "launch_folder": str(launch),
        "created": 1700000000.0,
        "tags": {"git.commit": "c0ffee"},
        **fields,
        "tracking": tracking,
    }
    (folder / "run.json").write_text(json.dumps(values))
    (folder / "resolved.yaml").write_text("seed: 1\nmodel:\n  name: 百川\n  betas: [0.9, 0.95]\n")
    (folder / "overrides.txt").write_text("seed=1\n")
    return folder


def write_steps(
    folder: Path, first: int, last: int, segment: int = 0, end: str | None = None, shift: float = 0.0
):
    """Append a segment to the journal."""
    with Journal(folder / "metrics.jsonl", segment) as journal:
        journal.event("start", step=first - 1, world_size=1)
        for step in range(first, last + 1):
            values = {"train/loss": 5.0 - step / 100 + shift, "perf/step_time_s": 0.1 + segment}
            journal.metrics(step, values)
        if end:
            journal.event(end, step=last, reason=f"it is {end}")
