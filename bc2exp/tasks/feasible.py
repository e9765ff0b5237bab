"""Whether trainings fit their devices, asked by the parent of a sweep, which loads no torch:

    python -m bc2exp.tasks.feasible < CONFIGURATIONS

Standard input is a JSON list of configurations. The last line of the output is a JSON list of as many
elements: a sentence for one whose plan does not fit, else null, as for one that cannot be planned.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from omegaconf import DictConfig, OmegaConf

from bc2exp.config.errors import UserError
from bc2exp.config.load import typed
from bc2exp.config.root import Config
from bc2exp.config.task import PlanConfig
from bc2exp.plan.planner import Choice, Planner
from bc2exp.tasks.plan import make_choice, make_planner
from bc2exp.tracking.journal import NullJournal


class Judge:
    """Plans configurations as task=plan does, each layout of a model and a batch once."""

    def __init__(self) -> None:
        self._planners: dict[str, Planner] = {}
        self._needed: dict[tuple[str, Choice], int] = {}

    def __call__(self, config: Config) -> str | None:
        """Why a training does not fit; None where it does, or where nothing says so."""
        memory, reserve = config.hardware.memory_gib, PlanConfig.reserve
        if memory is None:
            return None
        try:
            needed = self._bytes(config) / 2**30
        except UserError:
            return None  # the run itself says what is wrong with its model
        limit = memory * (1 - reserve)
        if needed <= limit:
            return None
        return (
            f"does not fit: needs {_gib(needed)} GiB of a device; of hardware.memory_gib={memory:g} a plan "
            f"leaves {_gib(limit)}"
        )

    def _bytes(self, config: Config) -> int:
        planner, key = self._planner(config)
        choice = make_choice(config)
        if (key, choice) not in self._needed:
            self._needed[key, choice] = planner.plan(choice, exact=True).memory.total
        return self._needed[key, choice]

    def _planner(self, config: Config) -> tuple[Planner, str]:
        about = (config.model, config.hardware, config.dataset.sequence_length)
        batch = getattr(config.task, "global_batch", None)
        key = repr((asdict(about[0]), asdict(about[1]), about[2], batch))
        if key not in self._planners:
            self._planners[key] = make_planner(config, NullJournal())
        return self._planners[key], key


def _gib(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def main() -> None:
    """Answer the question on standard input."""
    judge, answers = Judge(), []
    for plain in json.load(sys.stdin):
        config = OmegaConf.create(plain)
        assert isinstance(config, DictConfig)
        answers.append(judge(typed(config)))
    print(json.dumps(answers, ensure_ascii=False))


if __name__ == "__main__":
    main()
