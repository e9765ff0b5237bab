"""The parallelism group: on how many ranks which part of the work lies. It never changes a number."""

from __future__ import annotations

from dataclasses import dataclass

from bc2exp.config.fields import setting


@dataclass
class ParallelismConfig:
    """Degrees whose product is the number of devices; -1 takes what is left."""

    name: str = setting("name of the layout, used for runs")
    replicate: int = setting(
        "data-parallel ranks, each with the whole model; -1: all that are left", minimum=-1
    )
