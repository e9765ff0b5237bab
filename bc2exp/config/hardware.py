"""The hardware group: where a run computes, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from bc2exp.config.fields import setting


class Precision(Enum):
    """bf16: computes in bf16, keeps fp32 parameters, moments and reductions; fp32: fp32 throughout."""

    bf16 = "bf16"
    fp32 = "fp32"


class Backend(Enum):
    """The device families."""

    cpu = "cpu"
    cuda = "cuda"
    npu = "npu"


@dataclass
class HardwareConfig:
    """Devices and precision. Nothing here but the precision may change a loss."""

    name: str = setting("name of the hardware, used for runs")
    backend: Backend = setting("device family")
    num_devices: int = setting("devices, one rank each", minimum=1, maximum=65536)
    precision: Precision = setting("bf16 or fp32")
    peak_tflops: float | None = setting(
        "dense peak of a device, TFLOP/s; null: unknown, no MFU", None, above=0
    )
    peak_name: str | None = setting("which peak that is, as MFU is reported with it", None)
    memory_gib: float | None = setting(
        "memory of a device, GiB; null: unknown, plans have no verdict", None, above=0
    )
    devices_per_node: int | None = setting("devices of a machine; null: all on one", None, minimum=1)
    link_gb_s: float | None = setting(
        "GB/s that leave a device for others of its machine in a collective; null: unknown", None, above=0
    )
    link_per_pair: bool = setting(
        "every pair of devices has a link of link_gb_s of its own: n devices reach n - 1 times that", False
    )
    network_gb_s: float | None = setting(
        "GB/s that leave a device for other machines; null: unknown", None, above=0
    )
    fused_attention: bool = setting("the device's own operator for attention; false: its eager twin", True)
    fused_rms_norm: bool = setting("the same for the norms", True)
    fused_swiglu: bool = setting("the same for the activation of the feed-forward network", True)
    fused_rotary: bool = setting("the same for rotary positions", True)
    fused_adamw: bool = setting("one operator for the optimizer's step; false: one a weight", True)
    deterministic: bool = setting(
        "the same bits from the same input every time, slower; an error names an operator that cannot", False
    )
    rehearsal: bool = setting(
        "play NPUs on host memory with the real torch_npu: tests a run where there are none; no speeds", False
    )
    efficiency: float = setting(
        "part of the peak that a plan takes training's operations to reach", 0.6, above=0, maximum=1
    )


REHEARSED = frozenset({Backend.npu.name})
"""Families whose devices `hardware.rehearsal` can play."""


def rehearsal_of(values: dict[str, Any], folder: Path) -> list[str]:
    """Only a device of these families can be played. A check of `checks.check`."""
    hardware = values["hardware"]
    if not hardware["rehearsal"] or hardware["backend"] in REHEARSED:
        return []
    return [
        f"hardware.rehearsal=True: only NPUs are rehearsed, and hardware={hardware['name']} computes on "
        f"{hardware['backend']}; leave the key out, or choose hardware=8npu"
    ]
