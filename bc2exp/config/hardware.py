"""The hardware group: where a run computes, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from bc2exp.config.fields import setting


class Precision(Enum):
    """bf16: computes in bf16, keeps fp32 parameters, moments and reductions; fp32: fp32 throughout."""

    bf16 = "bf16"
    fp32 = "fp32"


class Backend(Enum):
    """The device families that `bc2exp.hardware` has a module for."""

    cpu = "cpu"


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
