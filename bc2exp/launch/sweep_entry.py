"""Hydra's entry with a sweep behind it: Hydra calls once for every job."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bc2exp.config.errors import UserError
from bc2exp.config.load import digest, finalize
from bc2exp.launch.drawing import Told
from bc2exp.launch.feasibility import infeasible as why_not
from bc2exp.launch.folder import RUN_FILE
from bc2exp.launch.ledger import INFEASIBLE, OVER, Job
from bc2exp.launch.run import DONE
from bc2exp.launch.sweep import RunJob, Sweep
from bc2exp.launch.sweep_folder import begin

Enter = Callable[[list[str], Callable[[DictConfig], "float | None"]], None]
"""Lets Hydra read a command line and call a function for every job."""


class _Enough(BaseException):
    """Ends the work of a sweeper. No Exception, as Hydra makes those a job's result."""


class SweepEntry:
    """The jobs of one command line, as Hydra calls for them.

    Those of a sweep without a drawing sweeper run once all are known. Of one that draws (`drawn`) each runs
    as it comes, and the sweeper gets its value.

    Args:
        launch_folder: where the command was typed.
        typed: its overrides.
        run_job: does a job.
        drawn: whether a sweeper draws the jobs.
        written: whether they are written down for Slurm and none is run.
        infeasible: {digest of a configuration: why it cannot be run}, unless they are drawn.
        sweep: one that goes on.
    """

    def __init__(
        self,
        launch_folder: Path,
        typed: list[str],
        run_job: RunJob,
        *,
        drawn: bool,
        written: bool = False,
        infeasible: dict[str, str] | None = None,
        sweep: Sweep | None = None,
    ) -> None:
        self._launch_folder = launch_folder
        self._typed = typed
        self._run_job = run_job
        self._drawn = drawn
        self._written = written
        self._infeasible = infeasible or {}
        self._sweep = sweep
        self._told = Told(sweep.ledger) if sweep is not None else None
        self._refused: UserError | None = None
        self._around = ExitStack()

    def enter(self, words: list[str], enter_hydra: Enter) -> int:
        """Run the sweep of a command line; returns the exit code. Raises UserError where it cannot begin."""
        with self._around:
            if self._sweep is not None:
                self._around.enter_context(self._sweep.open())
            try:
                enter_hydra(words, self._job)
                ended = True
            except _Enough:
                ended = False
            if self._refused is not None:
                raise self._refused
            assert self._sweep is not None
            if ended and not self._sweep.stopping:
                self._sweep.ledger.close_plan()
            if not self._drawn:
                self._around.enter_context(self._sweep.open())
                if self._written:
                    self._sweep.hand_over()
                else:
                    self._sweep.run_all()
        return self._sweep.code()

    def _job(self, config: DictConfig) -> float | None:
        if self._refused is not None:
            return None
        try:
            return self._take(config)
        except UserError as error:  # through Hydra it would be a traceback
            self._refused = error
            if self._drawn:
                raise _Enough from None
            return None

    def _take(self, config: DictConfig) -> float | None:
        context = HydraConfig.get()
        plain = finalize(config, self._launch_folder)
        if self._sweep is None:
            path = (self._launch_folder / context.sweep.dir).resolve()
            self._sweep = begin(
                path, self._typed, plain, self._launch_folder, self._run_job, drawn=self._drawn
            )
            if self._drawn:
                self._around.enter_context(self._sweep.open())
        job = self._find(plain, Path(context.runtime.output_dir).resolve(), list(context.overrides.task))
        if not self._drawn:
            return None
        if self._sweep.stopping:
            raise _Enough
        value = self._sweep.run(job)
        if self._sweep.stopping:
            raise _Enough
        return value

    def _find(self, plain: dict[str, Any], folder: Path, overrides: list[str]) -> Job:
        """The job that Hydra calls for: one that the ledger knows, or a new one."""
        assert self._sweep is not None
        ledger = self._sweep.ledger
        if self._told is not None:
            found, remark = self._told.find(overrides)
            if remark:
                print(remark, flush=True)
            if found is not None:
                if found.status in OVER:
                    print(f"job {found.number}: {found.status}, and told the sweeper again", flush=True)
                return found
        if self._told is not None and any(job.folder == folder for job in ledger.jobs):
            folder = ledger.folder / str(len(ledger.jobs))
        if any(job.folder == folder for job in ledger.jobs) or (folder / RUN_FILE).exists():
            raise UserError(f"hydra.sweep.subdir: {folder} would hold two runs; leave the key out")
        job = ledger.add(plain, folder, overrides)
        reason = why_not([plain])[0] if self._drawn else self._infeasible.get(digest(plain))
        if reason is not None:
            ledger.ended(job, INFEASIBLE, DONE, reason)
            if self._drawn:
                print(f"job {job.number}: {job.status}: {reason}", flush=True)
        return job
