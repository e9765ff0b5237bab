"""A sweeper for tests: each value it asks for follows from what the last job came to."""

from __future__ import annotations

import math
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

ConfigStore.instance().store(
    group="hydra/sweeper",
    name="following",
    node={"_target_": "hydra_plugins.following.Following", "num_jobs": 5},
)


class Following(Sweeper):
    """Begins at the start of an interval; a value v leads from x to x / (1 + v), a failure to 0.9 x."""

    def __init__(self, num_jobs: int) -> None:
        self.num_jobs = num_jobs

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        fixed, x, name = [], 0.0, ""
        for override in OverridesParser.create().parse_overrides(arguments):
            value = override.value()
            if isinstance(value, IntervalSweep):
                x, name = float(value.start), override.get_key_element()
            else:
                fixed.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
        for number in range(self.num_jobs):
            (done,) = self.launcher.launch([[*fixed, f"{name}={x}"]], initial_job_idx=number)
            value = done.return_value
            assert isinstance(value, float), value
            x = round(x / (1 + value) if math.isfinite(value) else 0.9 * x, 6)
