"""What a rank asked of its devices: operators with types and shapes, collectives, refusals, fallbacks.

The host kernels count themselves here, below autograd and FSDP, so that nothing passes by; collectives and
refused runtime calls are counted by the C files. `record` merges what the ranks of a run counted.
"""

from __future__ import annotations

import collections
import ctypes
from collections.abc import Iterable
from typing import Any

import torch
import torch_npu

from bc2exp.hardware.phase import current

host_kernels: collections.Counter[str] = collections.Counter()
"""Calls of ATen operators, by name."""
operators: dict[str, collections.Counter[tuple[str, ...]]] = collections.defaultdict(collections.Counter)
"""Calls of fused operators, by name, then by type and shape of their tensors."""
phases: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
"""The same calls, by name, then by what the rank was at."""
refused: collections.Counter[tuple[str, str]] = collections.Counter()
"""Refused calls, by operator and reason."""
fallbacks: collections.Counter[str] = collections.Counter()
"""Calls of operators that torch_npu has no kernel for and would run on the CPU, by name."""

HCCL_TYPES = [
    "int8",
    "int16",
    "int32",
    "float16",
    "float32",
    "int64",
    "uint64",
    "uint8",
    "uint16",
    "uint32",
    "float64",
    "bfloat16",
    "int128",
    "-",
    "hif8",
    "float8_e4m3",
    "float8_e5m2",
    "float8_e8m0",
]
"""Names of HCCL's data types, in the order of their numbers."""


class Refusal(NotImplementedError):
    """The rehearsal does not cover what was called; the message names it."""


def refuse(operator: str, reason: str) -> Refusal:
    """The error to raise for a call that is not covered; it is counted."""
    refused[operator, reason] += 1
    return Refusal(f"the rehearsal refuses {operator}: {reason}")


def count_operator(name: str, values: Iterable[Any]) -> None:
    """Count one call of a fused operator on arguments of which the tensors, and lists of them, matter."""
    shown = tuple(text for text in map(_shown, values) if text)
    operators[name][shown] += 1
    phases[name][current()] += 1


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_type(value)}{list(value.shape)}"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return f"{len(value)} x {_type(value[0])}"
    return ""


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def snapshot(library: ctypes.CDLL) -> dict[str, Any]:
    """Everything counted so far in this process, as JSON holds it; `library` holds the C files."""
    collectives, runtime = _native(library)
    return {
        "operators": {
            name: {
                "calls": sum(found.values()),
                "phases": dict(sorted(phases[name].items())),
                "tensors": [{"calls": calls, "arguments": list(shown)} for shown, calls in found.items()],
            }
            for name, found in sorted(operators.items())
        },
        "collectives": collectives,
        "host_kernels": dict(sorted(host_kernels.items())),
        "refused_operators": [
            {"operator": name, "reason": reason, "calls": calls} for (name, reason), calls in refused.items()
        ],
        "refused_runtime_calls": runtime,
        "cpu_fallbacks": dict(sorted(fallbacks.items())),
        "peak_memory_bytes": _peak_memory(),
    }


def _peak_memory() -> int:
    """The most that tensors of this process have taken of its device, in bytes, by torch_npu's allocator."""
    npu = torch_npu.npu
    return int(npu.max_memory_allocated()) if npu.is_initialized() else 0


def _native(library: ctypes.CDLL) -> tuple[dict[str, Any], dict[str, int]]:
    """Collectives by name, and refused runtime calls."""
    library.rehearsal_census_lost.restype = ctypes.c_uint64
    assert library.rehearsal_census_lost() == 0, "more kinds of collectives than the table holds"
    collectives: dict[str, Any] = {}
    runtime: dict[str, int] = {}
    name, kind = ctypes.c_char_p(), ctypes.c_int()
    elements, ranks, calls = ctypes.c_uint64(), ctypes.c_uint32(), ctypes.c_uint64()
    for index in range(library.rehearsal_census_entries()):
        fields = (name, kind, elements, ranks, calls)
        library.rehearsal_census_entry(index, *map(ctypes.byref, fields))
        text = (name.value or b"").decode()
        if kind.value < 0:
            runtime[text] = runtime.get(text, 0) + calls.value
            continue
        entry = collectives.setdefault(text, {"calls": 0, "tensors": []})
        entry["calls"] += calls.value
        size = {"dtype": HCCL_TYPES[kind.value], "shape": [elements.value], "ranks": ranks.value}
        entry["tensors"].append({"calls": calls.value, **size})
    return dict(sorted(collectives.items())), dict(sorted(runtime.items()))
