"""How long an optimizer step takes at least, from the rates that a hardware file declares."""

from __future__ import annotations

from dataclasses import dataclass

from bc2exp.parallel.mesh import Mesh
from bc2exp.plan.traffic import Exchange


@dataclass(frozen=True)
class Rates:
    """What a device is taken to reach. All from the hardware file.

    Attributes:
        peak_tflops: dense peak of a device, TFLOP/s.
        efficiency: the part of it that training's operations reach.
        link_gb_s, network_gb_s: GB/s that leave a device, to others of its machine and to other machines.
        link_per_pair: whether `link_gb_s` is that of the link to one other device.
        devices_per_node: devices of a machine.
    """

    peak_tflops: float
    efficiency: float
    link_gb_s: float
    network_gb_s: float
    devices_per_node: int
    link_per_pair: bool = False


@dataclass(frozen=True)
class Time:
    """Seconds of a step.

    Attributes:
        compute: operations, recomputation included.
        bubble: waiting of pipeline stages for one another.
        exchange: collectives that computation does not hide.
    """

    compute: float
    bubble: float
    exchange: float

    @property
    def step(self) -> float:
        """All of them."""
        return self.compute + self.bubble + self.exchange


def assumptions(rates: Rates, num_devices: int) -> list[str]:
    """What an estimate rests on, a sentence each."""
    found = [f"operations at {rates.efficiency:.0%} of {rates.peak_tflops:g} TFLOP/s in every layout"]
    if num_devices == 1:
        return found
    each = " to each other device" if rates.link_per_pair else " a device"
    inside = (
        f"exchanges in rings at {rates.link_gb_s:g} GB/s{each} inside a machine of {rates.devices_per_node}"
    )
    if num_devices > rates.devices_per_node:
        inside += f", {rates.network_gb_s:g} GB/s a device between machines"
    return [
        *found,
        inside,
        "tensor-parallel and pipeline exchanges hide behind nothing, those of shards behind the computation",
        "a pipeline waits (stages - 1) / micro batches of its work",
    ]


def step_time(
    mesh: Mesh, exchanges: list[Exchange], rates: Rates, *, flops: float, num_micro_batches: int
) -> Time:
    """Seconds of a step. `flops` are those of one device in the step, recomputation included."""
    compute = flops / (rates.peak_tflops * 1e12 * rates.efficiency)
    times = dict.fromkeys(("pipeline", "replicate", "shard", "tensor"), 0.0)
    for exchange in exchanges:
        rate = rates.network_gb_s
        if _inside(mesh, exchange.axis, rates):
            links = exchange.ranks - 1 if rates.link_per_pair and exchange.kind != "send" else 1
            rate = rates.link_gb_s * links
        times[exchange.axis] += exchange.bytes_on_wire() / (rate * 1e9)
    hidden = max(0.0, times["shard"] - compute)
    exchange_time = times["tensor"] + times["pipeline"] + times["replicate"] + hidden
    bubble = (mesh.pipeline - 1) / num_micro_batches * (compute + times["tensor"])
    return Time(compute, bubble, exchange_time)


def _inside(mesh: Mesh, axis: str, rates: Rates) -> bool:
    """Whether the ranks of an axis are all on one machine: inner axes vary fastest."""
    span = mesh.tensor
    for name, degree in (("shard", mesh.shard), ("replicate", mesh.replicate), ("pipeline", mesh.pipeline)):
        if axis == "tensor":
            break
        span *= degree
        if axis == name:
            break
    return span <= rates.devices_per_node


def recomputed(kind: str, *, flops: float, head_flops: float, feed_forward_flops: float) -> float:
    """Operations of a second forward pass: of whole layers, of the feed-forward networks, or of nothing.

    All arguments count forward and backward; a forward pass is a third of that.
    """
    return {"none": 0.0, "selective": feed_forward_flops / 3, "full": (flops - head_flops) / 3}[kind]
