"""What Slurm's environment says of the machines of a job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NUM_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
"""A step (srun) may have fewer nodes than its job, so its own variable comes first."""
NODE_RANK = "SLURM_NODEID"
NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")

_LOWEST_PORT, _NUM_PORTS = 20000, 10000

_NUMBER = re.compile(r"\d+")
_RANGE = r"\d+(?:-\d+)?"
_HOSTS = re.compile(rf"(?:[\w.-]+|\[{_RANGE}(?:,{_RANGE})*\])+")
_LIST = re.compile(rf"{_HOSTS.pattern}(?:,{_HOSTS.pattern})*")


def first_variable(names: tuple[str, ...], environment: Mapping[str, str]) -> str | None:
    """The first of some variables that is set."""
    return next((name for name in names if environment.get(name)), None)


def read_slurm(environment: Mapping[str, str]) -> dict[str, Any]:
    """`nnodes`, `node_rank` and `rdzv_endpoint` as Slurm gives them; what it does not say is left out.

    The port is the job's own (by its number), below those that systems hand out themselves.

    Raises ValueError, naming the variable, where one cannot be read.
    """
    found: dict[str, Any] = {}
    numbers = {"nnodes": first_variable(NUM_NODES, environment), "node_rank": NODE_RANK}
    for key, name in numbers.items():
        value = environment.get(name or "")
        if value:
            if not _NUMBER.fullmatch(value):
                raise ValueError(f"{name}={value}: is no number")
            found[key] = int(value)
    name = first_variable(NODE_LISTS, environment)
    if name is not None and found.get("nnodes") != 1:
        job = environment.get("SLURM_JOB_ID", "0")
        port = _LOWEST_PORT + (int(job) % _NUM_PORTS if _NUMBER.fullmatch(job) else 0)
        try:
            found["rdzv_endpoint"] = f"{first_host(environment[name])}:{port}"
        except ValueError as error:
            raise ValueError(f"{name}={environment[name]}: {error}") from None
    return found


def first_host(nodelist: str) -> str:
    """The first host of Slurm's short form: `gpu[003-010,12],login1` begins with `gpu003`.

    Slurm numbers the nodes of a job in the order of this list. A name may hold several brackets
    (`rack[1-2]n[04-07]`) and go on behind them. Raises ValueError for text that is no such list.
    """
    if not _LIST.fullmatch(nodelist.strip()):
        raise ValueError("is no list of hosts")
    first = _HOSTS.match(nodelist.strip())
    assert first is not None
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
