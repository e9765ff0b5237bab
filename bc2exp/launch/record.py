"""What a run folder says of how it came about: configuration, command, source, environment."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from bc2exp import __version__
from bc2exp.config.load import digest
from bc2exp.config.roots import checkout
from bc2exp.launch.folder import RUN_FILE, RunFolder, new_identity
from bc2exp.storage.atomic import write_json, write_text

_MAX_DIFF_BYTES = 10_000_000


def write_record(
    folder: RunFolder, plain: dict[str, Any], overrides: list[str], launch_folder: Path, tags: dict[str, str]
) -> dict[str, Any]:
    """Write everything but the journal. A resumed run keeps its identity. Returns the content of run.json."""
    path = folder.path
    write_text(path / "resolved.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    write_text(path / "overrides.txt", "".join(f"{text}\n" for text in overrides))
    git = git_state(checkout())
    write_json(path / "git.json", {key: value for key, value in git.items() if key != "diff"})
    if git.get("diff"):
        write_text(path / "git.diff", git["diff"])
    write_json(path / "environment.json", environment())
    if folder.resumed:
        import json

        run: dict[str, Any] = json.loads((path / RUN_FILE).read_text())
        if run["digest"] != digest(plain):
            run = {**run, "digest": digest(plain)}
            write_json(path / RUN_FILE, run)
        return run
    now = datetime.now()
    run = {
        "id": new_identity(),
        "name": plain["tracking"]["run_name"] or run_name(plain, now),
        "task": plain["task"]["name"],
        "digest": digest(plain),
        "launch_folder": str(launch_folder),
        "created": time.time(),
        "tracking": tracking_record(plain, launch_folder),
        "tags": {"git.commit": str(git.get("commit")), **tags},
    }
    write_json(path / RUN_FILE, run)
    return run


def run_name(plain: dict[str, Any], now: datetime) -> str:
    """model-hardware-layout-time."""
    parts = (plain["model"]["name"], plain["hardware"]["name"], plain["parallelism"]["name"])
    return "-".join((*parts, f"{now:%Y%m%d-%H%M%S}"))


def tracking_record(plain: dict[str, Any], launch_folder: Path) -> dict[str, Any]:
    """Address, experiment and place of artifacts, all absolute, so that `mlflow ui` there shows the run."""
    tracking = plain["tracking"]
    uri = tracking["uri"] or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    relative = uri.removeprefix("sqlite:///")
    local = uri.startswith("sqlite:///")
    if local and not relative.startswith("/"):
        uri = f"sqlite:///{launch_folder / relative}"
    experiment = tracking["experiment"] or plain["task"]["name"]
    return {
        "enabled": tracking["enabled"],
        "uri": uri,
        "experiment": experiment,
        "artifact_location": str(launch_folder / "mlartifacts" / experiment) if local else None,
    }


def git_state(root: Path | None) -> dict[str, str | None]:
    """Commit, branch, changed files and the uncommitted diff of the source checkout; empty without one."""
    if root is None or not (root / ".git").exists():
        return {"commit": None, "version": __version__}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, timeout=10, check=False, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None

    diff = git("diff", "HEAD") or ""
    return {
        "commit": git("rev-parse", "HEAD"),
        "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
        "status": git("status", "--porcelain"),
        "version": __version__,
        "diff": diff + "\n" if 0 < len(diff) <= _MAX_DIFF_BYTES else None,
    }


def environment() -> dict[str, Any]:
    """Interpreter, machine and installed packages."""
    packages = {dist.metadata["Name"]: dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "host": platform.node(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }
