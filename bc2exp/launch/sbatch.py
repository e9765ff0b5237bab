"""The jobs of a sweep as a Slurm array: a plain file for `sbatch`, in which each task does one job."""

from __future__ import annotations

import shlex
import sys
from itertools import pairwise
from pathlib import Path

from bc2exp.storage.atomic import write_text

SBATCH = "jobs.sbatch"

_FILE = """\
#!/usr/bin/env bash
# The jobs of a sweep as a Slurm array. Add what your cluster asks for (partition, account, devices), then
#   sbatch {file}
# and, once all have ended, rank them:
#   {resume}
#SBATCH --job-name=bc2exp-sweep
#SBATCH --array={array}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={num_devices}
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300      # five minutes before the end: save a checkpoint and stop
#SBATCH --output={output}
##SBATCH --gpus-per-node={num_devices}       # or as your cluster calls its devices

set -euo pipefail
cd {launch_folder}
# exec: the signal of the line above reaches the command itself
exec {command} sweep.job="${{SLURM_ARRAY_TASK_ID:?}}"
"""


def write_sbatch(path: Path, numbers: list[int], num_devices: int, launch_folder: Path) -> None:
    """Write `jobs.sbatch` into the sweep's folder `path`.

    Args:
        numbers: of the jobs, in rising order; at least one.
        num_devices: what the largest of them runs on.
        launch_folder: where the sweep was typed.
    """
    words = ["-m", "bc2exp", "-m", f"sweep.resume={path}"]
    text = _FILE.format(
        file=shlex.quote(str(path / SBATCH)),
        resume=shlex.join(["python", *words]),
        array=array(numbers),
        num_devices=num_devices,
        output=shlex.quote(str(path / "logs").replace("%", "%%") + "/slurm-%A_%a.out"),
        launch_folder=shlex.quote(str(launch_folder)),
        command=shlex.join([sys.executable, *words]),
    )
    write_text(path / SBATCH, text)


def array(numbers: list[int]) -> str:
    """Numbers as Slurm lists them: `0-3,5`."""
    first = numbers[0]
    parts = []
    for last, following in pairwise([*numbers, numbers[-1] + 2]):
        if following > last + 1:
            parts.append(str(first) if first == last else f"{first}-{last}")
            first = following
    return ",".join(parts)
