"""What a run asks of this machine: its share of the devices, and on node 0 a free port."""

from __future__ import annotations

import os
from typing import Any

from bc2exp.config.errors import UserError
from bc2exp.config.hardware import REHEARSED
from bc2exp.config.nodes import Nodes, find_nodes
from bc2exp.config.parallelism import AXES, degrees
from bc2exp.config.tasks import TASKS
from bc2exp.hardware import HOST, count_devices, environment_problems, rehearsal
from bc2exp.hardware.probe import recorded_environment
from bc2exp.launch.line import is_free


def needed_devices(plain: dict[str, Any], nodes: Nodes) -> tuple[str, int]:
    """Kind and number of the devices of this machine that the task is done on, a rank each."""
    if not TASKS[plain["task"]["name"]].on_devices:
        return HOST, 1
    return plain["hardware"]["backend"], plain["hardware"]["num_devices"] // nodes.count


def is_rehearsal(plain: dict[str, Any]) -> bool:
    """Whether the devices of the run are played on host memory."""
    return bool(plain["hardware"]["rehearsal"]) and TASKS[plain["task"]["name"]].on_devices


def rank_variables(plain: dict[str, Any]) -> dict[str, str]:
    """The environment variables of a rank that change what its device does, as they hold."""
    if not TASKS[plain["task"]["name"]].on_devices:
        return recorded_environment(HOST, 1)
    backend, num_ranks = needed_devices(plain, find_nodes(plain))
    return recorded_environment(
        backend,
        num_ranks,
        deterministic=plain["hardware"]["deterministic"],
        rehearsal=is_rehearsal(plain),
    )


def require(plain: dict[str, Any], nodes: Nodes) -> None:
    """Raise UserError where this machine lacks what the configuration asks of it."""
    backend, wanted = needed_devices(plain, nodes)
    if is_rehearsal(plain):
        rehearsal.prepare()
        _require_room(plain)
    else:
        _require_devices(plain, backend, wanted, nodes)
    if nodes.count > 1 and nodes.rank == 0 and not is_free(nodes.port):
        raise UserError(
            f"launch.rdzv_endpoint={nodes.endpoint}: this port is in use here; name another on every machine"
        )


def _require_room(plain: dict[str, Any]) -> None:
    """All devices of a rehearsal lie in the memory of this machine, which would end other processes for want
    of it. Counted are parameters, gradients and two moments in fp32, nothing else."""
    model, parallelism = plain["model"], plain["parallelism"]
    degree = degrees({axis: parallelism[axis] for axis in AXES}, plain["hardware"]["num_devices"])
    layers = model["num_layers"]
    if plain["task"]["name"] == "doctor":
        layers = min(layers, 2 * degree["pipeline"])
    hidden, inner = model["hidden_size"], model["intermediate_size"]
    a_layer = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    parameters = 2 * (model["vocab_size"] or 0) * hidden + layers * a_layer + hidden
    needed, present = 16 * parameters * degree["replicate"], host_memory_bytes()
    if needed > present:
        raise UserError(
            f"hardware.rehearsal=true: parameters, gradients and moments of model={model['name']} take "
            f"{needed / 2**30:.0f} GiB, and this machine has {present / 2**30:.0f}; rehearse "
            f"model={_tiny(model)}, which makes the same calls"
        )


def host_memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _tiny(model: dict[str, Any]) -> str:
    """The small model of the same kind."""
    return "tiny_13b" if model["position"] == "alibi" else "tiny_7b"


def _require_devices(plain: dict[str, Any], backend: str, wanted: int, nodes: Nodes) -> None:
    hardware = plain["hardware"]["name"]
    present = count_devices(backend)
    if present is not None and present < wanted:
        share = f"device{'s' * (wanted > 1)}"
        if nodes.count > 1:
            share += f" on each of {nodes.count} machines"
        sentence = f"hardware={hardware}: asks for {wanted} {backend} {share}, this machine has {present}"
        raise UserError("\n".join([sentence, *_instead(plain, backend)]))
    problems = [f"hardware={hardware}: {problem}" for problem in environment_problems(backend)]
    if problems:
        raise UserError("\n  ".join(problems))


def _instead(plain: dict[str, Any], backend: str) -> list[str]:
    """Commands that work without the devices: tiny models, as a rehearsal is no faster than the host."""
    if backend not in REHEARSED:
        return []
    model = _tiny(plain["model"])
    command = f"python -m bc2exp task={plain['task']['name']}"
    return [
        "  the same calls on host memory, through the real driver library: "
        f"{command} hardware={plain['hardware']['name']} hardware.rehearsal=true model={model}",
        f"  on the processor: {command} hardware={HOST} model={model}",
    ]
