"""What a run asks of this machine: its share of the devices, and on node 0 a free port."""

from __future__ import annotations

from typing import Any

from bc2exp.config.errors import UserError
from bc2exp.config.nodes import Nodes
from bc2exp.config.register import TASKS
from bc2exp.hardware import HOST, count_devices, has_backend
from bc2exp.launch.line import is_free


def needed_devices(plain: dict[str, Any], nodes: Nodes) -> tuple[str, int]:
    """Kind and number of the devices of this machine that the task is done on, a rank each."""
    if not TASKS[plain["task"]["name"]].on_devices:
        return HOST, 1
    return plain["hardware"]["backend"], plain["hardware"]["num_devices"] // nodes.count


def require(plain: dict[str, Any], nodes: Nodes) -> None:
    """Raise UserError where this machine lacks what the configuration asks of it."""
    backend, wanted = needed_devices(plain, nodes)
    if not has_backend(backend):
        raise UserError(
            f"hardware={plain['hardware']['name']}: nothing computes on {backend} devices yet; task=plan "
            "tells what a run on them takes"
        )
    present = count_devices(backend)
    if present is not None and present < wanted:
        share = f"device{'s' * (wanted > 1)}"
        if nodes.count > 1:
            share += f" on each of {nodes.count} machines"
        raise UserError(
            f"hardware={plain['hardware']['name']}: asks for {wanted} {backend} {share}, "
            f"this machine has {present}"
        )
    if nodes.count > 1 and nodes.rank == 0 and not is_free(nodes.port):
        raise UserError(
            f"launch.rdzv_endpoint={nodes.endpoint}: this port is in use here; name another on every machine"
        )
