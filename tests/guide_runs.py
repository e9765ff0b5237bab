"""A command line of a guide, done in this process on one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

from bc2exp.config.errors import UserError
from bc2exp.config.load import finalize, read
from bc2exp.config.preflight import preflight
from bc2exp.config.root import Config
from bc2exp.tasks import get_task
from tests.train.parts import ONE_RANK, Memory


def do(
    site: Path, words: list[str], before: Callable[[Config, Path], None] | None = None
) -> tuple[Path, Memory]:
    """Do the task of the overrides `words` as if typed in `site`; the run folder and the journal.

    `before` is called with configuration and run folder before the task. Raises UserError with what a person
    would be told.
    """
    checked = preflight(words, sweep=False, folder=site)
    if checked.problems:
        raise UserError("\n".join(checked.problems))
    named = [word.partition("=")[2] for word in words if word.startswith("hydra.run.dir=")]
    run = site / named[0] if named else site / "done" / f"{len(list(site.glob('done/*'))):03}"
    run.mkdir(parents=True)
    (run / "resolved.yaml").write_text(OmegaConf.to_yaml(finalize(checked.jobs[0], site)))
    config, journal = read(run / "resolved.yaml"), Memory()
    if before is not None:
        before(config, run)
    assert get_task(config.task.name)(config, run, ONE_RANK, journal) == "done"
    return run, journal
