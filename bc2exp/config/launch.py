"""The node `launch`: on how many machines a run is started, which one this is, and when a rank hangs."""

from __future__ import annotations

from dataclasses import dataclass

from bc2exp.config.fields import setting


@dataclass
class LaunchConfig:
    """Several machines, one command on each: null keys are read from Slurm, where it started the command. And
    when a rank counts as hung."""

    nnodes: int | None = setting(
        "machines; null: Slurm's, else 1; each has hardware.num_devices / nnodes devices",
        None,
        minimum=1,
        maximum=65536,
    )
    node_rank: int | None = setting("number of this machine, from 0; null: Slurm's", None, minimum=0)
    rdzv_endpoint: str | None = setting(
        "host:port of machine 0, a free port there; null: the first host of Slurm's list", None
    )
    wait_s: float = setting("seconds that the machines wait for each other at the start", 600.0, above=0)
    hang_s: float | None = setting(
        "seconds without a sign of life after which a rank counts as hung and the run ends; null: never",
        300.0,
        minimum=3,
    )
