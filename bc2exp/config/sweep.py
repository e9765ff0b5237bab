"""The node `sweep`: what `-m` makes of its jobs, and which sweep goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bc2exp.config.fields import setting
from bc2exp.config.roots import absolute, nearest

LEDGER = "ledger.jsonl"
"""The file in a sweep's folder that says which jobs there are and how they ended."""


@dataclass
class SweepConfig:
    """Several jobs of one command line, `-m`. Not a part of what a job computes."""

    resume: str | None = setting("folder of a sweep that goes on with its jobs as they were", None, path=True)
    metric: str | None = setting(
        "what ranks the jobs, by its last value; null: eval/loss where all have it, else train/loss", None
    )
    direction: str = setting("which value is better", "lower", choices=("lower", "higher"))
    sbatch: bool = setting("write the jobs down as a Slurm array (jobs.sbatch), run none", False)
    job: int | None = setting(
        "do this job of the sweep that goes on and no other, as a task of jobs.sbatch does", None, minimum=0
    )


def sweep_to_resume(values: dict[str, Any], folder: Path) -> Iterator[str]:
    """`sweep.resume` names a sweep, and `sweep.job` one of its jobs. A check of `checks.check`."""
    named, number = values["sweep"]["resume"], values["sweep"]["job"]
    if named is None:
        if number is not None:
            yield f"sweep.job={number}: is one of a sweep that goes on; name it by sweep.resume=FOLDER"
        return
    if number is not None and values["sweep"]["sbatch"]:
        yield f"sweep.job={number}: is done here, and sweep.sbatch=true writes jobs down; leave one out"
    path = absolute(named, folder)
    if not path.is_dir():
        yield f"sweep.resume={named}: no such folder{nearest(path)}"
    elif not (path / LEDGER).is_file():
        yield f"sweep.resume={named}: is no sweep's folder (it would hold {LEDGER})"
