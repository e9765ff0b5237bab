"""What a run folder says of how it came about: configuration, command, source, environment."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import uuid
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bc2exp import __version__
from bc2exp.config.load import digest
from bc2exp.config.roots import checkout
from bc2exp.config.secrets import ADDRESS, withdraw
from bc2exp.launch.folder import RUN_FILE, RunFolder
from bc2exp.launch.machine import rank_variables
from bc2exp.storage.atomic import write_json, write_text

_MAX_DIFF_BYTES = 10_000_000
_GIT_SECONDS = 10


def write_record(
    folder: RunFolder, plain: dict[str, Any], overrides: list[str], launch_folder: Path, tags: dict[str, str]
) -> dict[str, Any]:
    """Write everything but the journal. A resumed run keeps its identity. Returns the content of run.json."""
    path = folder.path
    write_text(path / "resolved.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
    write_text(path / "overrides.txt", "".join(f"{text}\n" for text in overrides))
    git = git_state(checkout())
    diff = git.pop("diff", None)
    write_json(path / "git.json", git)
    (path / "git.diff").unlink(missing_ok=True)  # of an earlier part of the run
    if diff:
        write_text(path / "git.diff", diff)
    variables = rank_variables(plain) if "hardware" in plain else {}  # a sweep has no ranks of its own
    write_json(path / "environment.json", {**environment(), "variables": variables})
    if folder.resumed:
        run: dict[str, Any] = json.loads((path / RUN_FILE).read_text())
        run["digest"] = digest(plain)
        # Relative addresses count from where the run was first started, wherever it goes on.
        run["tracking"] = tracking_record(plain, Path(run["launch_folder"]))
    else:
        run = {
            "id": uuid.uuid4().hex,  # tells this run from every other, wherever its folder moves
            "name": plain["tracking"]["run_name"] or run_name(plain, datetime.now()),
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
    uri = withdraw(tracking["uri"] or os.environ.get(ADDRESS) or "sqlite:///mlflow.db")
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
    """Commit, branch, changed files and the uncommitted diff of the source checkout.

    Only the version without a checkout; None for what git does not say.
    """
    if root is None or not (root / ".git").exists():
        return {"commit": None, "version": __version__}

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=_GIT_SECONDS, check=False, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode(errors="replace").rstrip("\n") if done.returncode == 0 else None

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
    read = [distribution.metadata for distribution in metadata.distributions()]  # a file each, at every call
    packages = {each["Name"]: each["Version"] for each in read if each["Name"]}
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "host": platform.node(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }
