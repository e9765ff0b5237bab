"""What a rank exchanges in an optimizer step: which collectives, how often, how many bytes.

Bytes are what a rank hands to the collective. The tensor-parallel ones are counted in the trace of the real
modules; those of shards, copies and stages follow from the layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from bc2exp.parallel.mesh import Mesh
from bc2exp.plan.trace import Pass, Passes

FP32 = 4


@dataclass(frozen=True)
class Exchange:
    """One kind of collective of a step.

    Attributes:
        axis: of the mesh.
        kind: allgather, reducescatter, allreduce or send.
        calls: times a step.
        sent: bytes that a rank hands over in all of them.
        ranks: that take part.
    """

    axis: str
    kind: str
    calls: int
    sent: int
    ranks: int

    def bytes_on_wire(self) -> float:
        """Bytes that leave a rank in a ring, the way of least bytes."""
        others = self.ranks - 1
        factor = {
            "allgather": float(others),
            "reducescatter": others / self.ranks,
            "allreduce": 2 * others / self.ranks,
        }
        return self.sent * factor.get(self.kind, 1.0)


def traffic(
    mesh: Mesh,
    passes: Passes,
    groups: dict[str, int],
    *,
    num_layers: int,
    num_micro_batches: int,
    compute_bytes: int,
    keep_gathered: bool,
    defer_reduction: bool,
) -> list[Exchange]:
    """The exchanges of one step of the rank that `mesh` is seen from.

    Args:
        groups: elements of each FSDP2 group of the stage, whole (`memory.groups`).
        num_layers: of the stage.
        compute_bytes: size of an element in the type of computing.
        keep_gathered, defer_reduction: see `Layout`.
    """
    found = _tensor(mesh, passes, num_layers, num_micro_batches)
    if mesh.shard > 1:
        found += _shards(mesh, groups, num_micro_batches, compute_bytes, keep_gathered, defer_reduction)
    if mesh.replicate > 1:
        sent = sum(-(-count // mesh.shard) for count in groups.values()) * FP32
        found.append(Exchange("replicate", "allreduce", len(groups), sent, mesh.replicate))
    if mesh.pipeline > 1:
        neighbours = (not mesh.first_stage) + (not mesh.last_stage)
        calls = neighbours * num_micro_batches
        found.append(Exchange("pipeline", "send", calls, calls * passes.hidden, 2))
    return found


def _tensor(mesh: Mesh, passes: Passes, num_layers: int, num_micro_batches: int) -> list[Exchange]:
    if mesh.tensor == 1:
        return []
    parts: list[tuple[Pass, int]] = [(passes.layer, num_layers)]
    parts += [(passes.embedding, 1)] * mesh.first_stage + [(passes.head, 1)] * mesh.last_stage
    calls: dict[str, int] = {}
    sent: dict[str, int] = {}
    for part, times in parts:
        for kind in part.calls:
            calls[kind] = calls.get(kind, 0) + times * num_micro_batches * part.calls[kind]
            sent[kind] = sent.get(kind, 0) + times * num_micro_batches * part.sent[kind]
    return [Exchange("tensor", kind, calls[kind], sent[kind], mesh.tensor) for kind in sorted(calls)]


def _shards(
    mesh: Mesh, groups: dict[str, int], num_micro_batches: int, compute_bytes: int, keep: bool, defer: bool
) -> list[Exchange]:
    gathers = gathered = 0
    for name, count in groups.items():
        # Freed after forward, a group is gathered again for backward; the head is not freed in between.
        times = 1 if keep else num_micro_batches * (1 if name == "head" else 2)
        gathers += times
        gathered += times * -(-count // mesh.shard) * compute_bytes
    reductions = 1 if defer else num_micro_batches
    reduced = reductions * sum(groups.values()) * FP32
    return [
        Exchange("shard", "allgather", gathers, gathered, mesh.shard),
        Exchange("shard", "reducescatter", reductions * len(groups), reduced, mesh.shard),
    ]
