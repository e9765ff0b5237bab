"""The door: `python -m bc2exp`, `bc2exp`.

Everything that can be wrong with a configuration is said here, before torch or mlflow are imported and
before anything is written.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from bc2exp.config.errors import UserError
from bc2exp.config.flags import read_flags, refuse_flags, refuse_package
from bc2exp.config.load import finalize
from bc2exp.config.nodes import find_nodes
from bc2exp.config.overrides import parse_word, quote
from bc2exp.config.preflight import Preflight, preflight, prepare_search_path
from bc2exp.config.register import register
from bc2exp.config.roots import data_root
from bc2exp.launch.folder import RunFolder, claim, named_folder
from bc2exp.launch.join import join_run
from bc2exp.launch.machine import is_rehearsal, require
from bc2exp.launch.run import DONE, WRONG, run_on_ranks, sync_runs

PARENT_TASKS = ("sync",)
"""Tasks that need no ranks."""


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(command(sys.argv[1:]))


def command(arguments: list[str]) -> int:
    """Check a command line, then hand it to Hydra; returns the exit code."""
    options, flags = read_flags(arguments)
    launch_folder = Path.cwd()
    register()
    prepare_search_path(launch_folder)
    problems = refuse_flags(options)
    if problems:
        return complain(problems)
    if options.hydra_help or options.shell_completion:
        return Door(launch_folder, None).enter(arguments)
    checked = preflight(options.overrides, sweep=bool(options.multirun), folder=launch_folder)
    problems = checked.problems or refuse_package(options, checked.jobs[0])
    if problems:
        return complain(problems)
    words = [*checked.overrides, *flags]
    if options.cfg or options.help or options.info:
        return Door(launch_folder, None).enter(words)
    try:
        return start(launch_folder, checked, words, sweep=bool(options.multirun))
    except UserError as error:
        print(f"bc2exp: {error}", file=sys.stderr)
        return WRONG


def start(launch_folder: Path, checked: Preflight, words: list[str], *, sweep: bool) -> int:
    """Claim the folder of a single run, and let Hydra run the job or the jobs."""
    chosen = any(parse_word(word).key in ("hydra.run.dir", "hydra.sweep.dir") for word in checked.overrides)
    plain = finalize(checked.jobs[0], launch_folder)
    nodes = find_nodes(plain)
    if sweep or plain["task"]["name"] in PARENT_TASKS or nodes.rank > 0:
        return Door(launch_folder, None).enter(words)
    require(plain, nodes)  # before Hydra, which would make the chosen folder
    if chosen:
        return Door(launch_folder, None).enter(words)
    folder = claim(plain, launch_folder, None, datetime.now())
    return Door(launch_folder, folder).enter([*words, f"hydra.run.dir={quote(str(folder.path))}"])


class Door:
    """Hydra's entry with our jobs behind it; remembers the worst exit code, as a job must not raise:
    that would end a sweep."""

    def __init__(self, launch_folder: Path, claimed: RunFolder | None) -> None:
        self._launch_folder = launch_folder
        self._claimed = claimed
        self._worst = DONE

    def enter(self, words: list[str]) -> int:
        """Run Hydra on a command line; returns the exit code."""
        sys.argv = [sys.argv[0], *words]
        decorate = hydra.main(version_base="1.3", config_path=str(data_root() / "conf"), config_name="config")
        decorate(self._job)()
        return self._worst

    def _job(self, config: DictConfig) -> None:
        try:
            code = self._run(config)
        except UserError as error:
            print(f"bc2exp: {error}", file=sys.stderr)
            code = WRONG
        self._worst = max(self._worst, code)

    def _run(self, config: DictConfig) -> int:
        plain = finalize(config, self._launch_folder)
        if plain["task"]["name"] in PARENT_TASKS:
            return sync_runs(plain, self._launch_folder)
        context, nodes = HydraConfig.get(), find_nodes(plain)
        chosen = Path(context.runtime.output_dir)
        if nodes.rank > 0:
            return join_run(named_folder(plain, chosen), plain, nodes, self._launch_folder)
        folder = self._claimed
        if folder is None:
            require(plain, nodes)
            folder = claim(plain, self._launch_folder, chosen, datetime.now())
        overrides = list(context.overrides.task)
        tags = {"bc2exp.sweep": context.sweep.dir} if context.mode is RunMode.MULTIRUN else {}
        if nodes.count > 1:
            tags["bc2exp.nnodes"] = str(nodes.count)
        if is_rehearsal(plain):
            tags["bc2exp.rehearsal"] = "true"
        with folder.lock:
            return run_on_ranks(folder, plain, overrides, self._launch_folder, tags)


def complain(problems: list[str]) -> int:
    """Print every mistake, a line each; returns the exit code."""
    number = len(problems)
    print(f"bc2exp: {number} mistake{'s' * (number > 1)}; nothing was started or written", file=sys.stderr)
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    return WRONG


if __name__ == "__main__":
    main()
