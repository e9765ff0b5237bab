"""Which jobs of a sweep cannot be done, told before any of them starts: layouts that cannot be, and trainings
whose plan does not fit the memory of their devices.

The plan needs torch, so that another process makes it, and only where hardware.memory_gib is known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bc2exp.config.layouts import layout
from bc2exp.hardware import HOST
from bc2exp.hardware.probe import rank_environment

TRAININGS = ("pretrain", "finetune")


def infeasible(plains: list[dict[str, Any]]) -> list[str | None]:
    """Why each of these configurations cannot be run; None for one that can, as far as anybody knows."""
    found = ["; ".join(layout(plain, Path())) or None for plain in plains]
    asked = [
        number
        for number, plain in enumerate(plains)
        if not found[number]
        and plain["task"]["name"] in TRAININGS
        and plain["hardware"]["memory_gib"] is not None
    ]
    if asked:
        for number, answer in zip(asked, _ask([plains[number] for number in asked]), strict=True):
            found[number] = answer
    return found


def _ask(plains: list[dict[str, Any]]) -> list[str | None]:
    """What the planner says of trainings, in a process of its own. Where it fails, nothing is refused."""
    done = subprocess.run(
        [sys.executable, "-m", "bc2exp.tasks.feasible"],
        input=json.dumps(plains),
        capture_output=True,
        text=True,
        check=False,
        env={**rank_environment(HOST, 1), **os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    try:
        answers: list[str | None] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        print(f"bc2exp: whether the jobs fit their devices could not be planned: {said}", file=sys.stderr)
        return [None] * len(plains)
    return answers
