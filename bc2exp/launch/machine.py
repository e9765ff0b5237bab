"""What a run asks of this machine: its share of the devices, and on node 0 a free port."""

from __future__ import annotations

from typing import Any

from bc2exp.config.errors import UserError
from bc2exp.config.hardware import REHEARSED
from bc2exp.config.nodes import Nodes
from bc2exp.config.register import TASKS
from bc2exp.hardware import HOST, count_devices, environment_problems, rehearsal
from bc2exp.launch.line import is_free


def needed_devices(plain: dict[str, Any], nodes: Nodes) -> tuple[str, int]:
    """Kind and number of the devices of this machine that the task is done on, a rank each."""
    if not TASKS[plain["task"]["name"]].on_devices:
        return HOST, 1
    return plain["hardware"]["backend"], plain["hardware"]["num_devices"] // nodes.count


def is_rehearsal(plain: dict[str, Any]) -> bool:
    """Whether the devices of the run are played on host memory."""
    return bool(plain["hardware"]["rehearsal"]) and TASKS[plain["task"]["name"]].on_devices


def require(plain: dict[str, Any], nodes: Nodes) -> None:
    """Raise UserError where this machine lacks what the configuration asks of it."""
    backend, wanted = needed_devices(plain, nodes)
    if is_rehearsal(plain):
        rehearsal.prepare()
    else:
        _require_devices(plain, backend, wanted, nodes)
    if nodes.count > 1 and nodes.rank == 0 and not is_free(nodes.port):
        raise UserError(
            f"launch.rdzv_endpoint={nodes.endpoint}: this port is in use here; name another on every machine"
        )


def _require_devices(plain: dict[str, Any], backend: str, wanted: int, nodes: Nodes) -> None:
    hardware = plain["hardware"]["name"]
    present = count_devices(backend)
    if present is not None and present < wanted:
        share = f"device{'s' * (wanted > 1)}"
        if nodes.count > 1:
            share += f" on each of {nodes.count} machines"
        sentence = f"hardware={hardware}: asks for {wanted} {backend} {share}, this machine has {present}"
        raise UserError("\n".join([sentence, *_instead(plain, backend)]))
    for problem in environment_problems(backend):
        raise UserError(f"hardware={hardware}: {problem}")


def _instead(plain: dict[str, Any], backend: str) -> list[str]:
    """Commands that work without the devices: tiny models, as a rehearsal is no faster than the host."""
    if backend not in REHEARSED:
        return []
    model = "tiny_13b" if plain["model"]["position"] == "alibi" else "tiny_7b"
    command = f"python -m bc2exp task={plain['task']['name']}"
    return [
        "  the same calls on host memory, through the real driver library: "
        f"{command} hardware={plain['hardware']['name']} hardware.rehearsal=true model={model}",
        f"  on the processor: {command} hardware={HOST} model={model}",
    ]
