"""The machines of a run: from the keys `launch.*` and, where they are null, from Slurm's variables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from bc2exp.config.hydra_settings import RUN_FOLDER
from bc2exp.config.overrides import parse_word
from bc2exp.config.slurm import NUM_NODES, first_variable, read_slurm
from bc2exp.config.tasks import TASKS

_LAST_PORT = 65535


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, seen from one of them.

    Attributes:
        count: machines.
        rank: the number of this one; 0 keeps the run folder, the journal and the tracker.
        endpoint: `host:port` of machine 0 where the ranks meet; empty for one machine.
        wait_s: seconds that they wait for each other at the start.
    """

    count: int
    rank: int
    endpoint: str
    wait_s: float

    @property
    def host(self) -> str:
        """The host of the endpoint."""
        return split_endpoint(self.endpoint)[0]

    @property
    def port(self) -> int:
        """The port of the endpoint."""
        return split_endpoint(self.endpoint)[1]


ALONE = Nodes(1, 0, "", 0.0)


def find_nodes(plain: dict[str, Any], environment: Mapping[str, str] = os.environ) -> Nodes:
    """The machines of a resolved configuration.

    Raises ValueError, with a sentence for the person at the keyboard, where they do not add up.
    """
    launch = plain["launch"]
    task = plain["task"]["name"]
    if not TASKS[task].on_devices:
        if (launch["nnodes"] or 1) > 1:
            raise ValueError(f"launch.nnodes={launch['nnodes']}: task={task} runs on one machine")
        return ALONE
    values, origin = dict(launch), "launch.nnodes"
    if launch["nnodes"] != 1:
        for key, value in read_slurm(environment).items():
            if values[key] is None:
                values[key] = value
                origin = first_variable(NUM_NODES, environment) or origin if key == "nnodes" else origin
    count = values["nnodes"] or 1
    if count == 1:
        _refuse_keys_without_nodes(launch)
        return ALONE
    where = f"{origin}={count}"
    _refuse_several_a_node(launch, environment)
    devices = plain["hardware"]["num_devices"]
    if devices % count:
        fitting = [number for number in range(1, devices + 1) if devices % number == 0]
        near = min(fitting, key=lambda number: abs(number - count))
        raise ValueError(
            f"{where}: does not divide hardware.num_devices={devices}, which counts the devices of all "
            f"machines; launch.nnodes={near} would"
        )
    rank, endpoint = values["node_rank"], values["rdzv_endpoint"]
    if rank is None:
        raise ValueError(f"{where}: name this machine's number, launch.node_rank=0 to {count - 1}")
    if rank >= count:
        raise ValueError(f"launch.node_rank={rank}: {where}, so the machines are 0 to {count - 1}")
    if endpoint is None:
        raise ValueError(f"{where}: name machine 0 and a free port there, launch.rdzv_endpoint=HOST:29500")
    try:
        split_endpoint(endpoint)
    except ValueError:
        raise ValueError(
            f"launch.rdzv_endpoint={endpoint}: must be HOST:PORT, the port from 1 to {_LAST_PORT}; "
            f"launch.rdzv_endpoint={endpoint.partition(':')[0] or 'HOST'}:29500 would do"
        ) from None
    return Nodes(count, rank, endpoint, float(launch["wait_s"]))


def nodes_add_up(plain: dict[str, Any], folder: Path) -> list[str]:
    """The check of the machines, in the form that `checks.check` asks for."""
    try:
        find_nodes(plain)
    except ValueError as error:
        return [str(error)]
    return []


def shared_folder(config: DictConfig, words: Iterable[str], *, sweep: bool) -> list[str]:
    """Several machines find each other in the run folder: it must be named, and be one run's.

    Args:
        config: a composed configuration that passed the checks.
        words: the overrides of the command line.
        sweep: `-m` was given.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, enum_to_str=True))
    named = any(parse_word(word).key == RUN_FOLDER for word in words)
    nodes = find_nodes(plain)
    if nodes.count == 1:
        return []
    if sweep:
        return [f"-m: a sweep runs on one machine, and this one is of {nodes.count}; set launch.nnodes=1"]
    if named or plain["task"].get("resume") not in (None, "auto", "never"):
        return []
    return [
        f"launch.nnodes={nodes.count}: several nodes need an explicit, shared run folder; "
        "hydra.run.dir=FOLDER, one that every machine reaches by this name"
    ]


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[address]:port`. Raises ValueError for anything else."""
    host, _, port = endpoint.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(endpoint)
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) <= _LAST_PORT:
        raise ValueError(endpoint)
    return host, int(port)


def _refuse_keys_without_nodes(launch: dict[str, Any]) -> None:
    if launch["nnodes"] == 1:
        return  # somebody says that Slurm's machines are not meant
    for key in ("node_rank", "rdzv_endpoint"):
        if launch[key] is not None:
            raise ValueError(f"launch.{key}={launch[key]}: belongs to several machines; set launch.nnodes")


def _refuse_several_a_node(launch: dict[str, Any], environment: Mapping[str, str]) -> None:
    local = environment.get("SLURM_LOCALID", "0")
    if launch["nnodes"] is None and local != "0":
        raise ValueError(
            f"SLURM_LOCALID={local}: Slurm starts several tasks a machine; start one (--ntasks-per-node=1), "
            "and it starts a rank a device"
        )
