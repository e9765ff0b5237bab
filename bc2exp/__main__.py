"""The door: `python -m bc2exp`, `bc2exp`.

Everything that can be wrong with a configuration is said here, before torch or mlflow are imported and
before anything is written.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bc2exp.config.errors import UserError
from bc2exp.config.flags import read_flags, refuse_flags, refuse_package
from bc2exp.config.load import finalize
from bc2exp.config.nodes import find_nodes
from bc2exp.config.overrides import parse_word, quote
from bc2exp.config.preflight import Preflight, preflight, prepare_search_path
from bc2exp.config.register import register
from bc2exp.config.secrets import hiding, withdraw_from
from bc2exp.launch.compare import read_comparison, record_comparison
from bc2exp.launch.conversation import Conversation, converse
from bc2exp.launch.folder import RunFolder, claim, named_folder
from bc2exp.launch.join import join_run
from bc2exp.launch.machine import is_rehearsal, require
from bc2exp.launch.run import DONE, FAILED, WRONG, run_on_ranks, sync_runs
from bc2exp.launch.sweep_door import PARENT_TASKS, enter_hydra, resume_sweep, start_sweep


def main() -> None:
    """Run the command line and exit with its code."""
    sys.stdout, sys.stderr = hiding(sys.stdout), hiding(sys.stderr)
    sys.exit(command(sys.argv[1:]))


def command(arguments: list[str]) -> int:
    """Check a command line, then hand it to Hydra; returns the exit code."""
    arguments = withdraw_from(arguments)
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
    """Claim the folder of a single run and let Hydra run it; or begin a sweep, or go on with one."""
    chosen = any(parse_word(word).key == "hydra.run.dir" for word in checked.overrides)
    plain = finalize(checked.jobs[0], launch_folder)
    if plain["sweep"]["resume"] is not None:
        return resume_sweep(launch_folder, checked, plain)
    if not sweep and plain["sweep"]["sbatch"]:
        raise UserError("sweep.sbatch=true: writes down the jobs of a sweep; it needs -m")
    if sweep:
        return start_sweep(launch_folder, checked, words)
    nodes = find_nodes(plain)
    if plain["task"]["name"] == "compare":
        # read before Hydra, which would make the chosen folder
        return Door(launch_folder, None, comparison=read_comparison(plain, launch_folder)).enter(words)
    if plain["task"]["name"] in PARENT_TASKS or nodes.rank > 0:
        return Door(launch_folder, None).enter(words)
    require(plain, nodes)  # before Hydra, which would make the chosen folder
    conversation = converse(plain, nodes)
    if chosen:
        return Door(launch_folder, None, conversation).enter(words)
    folder = claim(plain, launch_folder, None, datetime.now())
    return Door(launch_folder, folder, conversation).enter(
        [*words, f"hydra.run.dir={quote(str(folder.path))}"]
    )


class Door:
    """Hydra's entry with our job behind it."""

    def __init__(
        self,
        launch_folder: Path,
        claimed: RunFolder | None,
        conversation: Conversation | None = None,
        comparison: dict[str, Any] | None = None,
    ) -> None:
        self._launch_folder = launch_folder
        self._claimed = claimed
        self._conversation = conversation
        self._comparison = comparison
        self._code = DONE

    def enter(self, words: list[str]) -> int:
        """Run Hydra on a command line; returns the exit code."""
        enter_hydra(words, self._job)
        return self._code

    def _job(self, config: DictConfig) -> None:
        try:
            self._code = self._run(config)
        except UserError as error:  # through Hydra it would be a traceback
            print(f"bc2exp: {error}", file=sys.stderr)
            self._code = WRONG

    def _run(self, config: DictConfig) -> int:
        plain = finalize(config, self._launch_folder)
        if plain["task"]["name"] == "sync":
            return sync_runs(plain, self._launch_folder)
        context, nodes = HydraConfig.get(), find_nodes(plain)
        chosen = Path(context.runtime.output_dir)
        overrides = list(context.overrides.task)
        if plain["task"]["name"] == "compare":
            report = self._comparison or read_comparison(plain, self._launch_folder)
            # the launch folder is what conf/config.yaml names
            place = None if chosen == self._launch_folder else chosen
            passed = record_comparison(report, plain, self._launch_folder, place, overrides, {})
            return DONE if passed else FAILED
        if nodes.rank > 0:
            return join_run(named_folder(plain, chosen), plain, nodes, self._launch_folder)
        folder, conversation = self._claimed, self._conversation
        if conversation is None:
            require(plain, nodes)
            conversation = converse(plain, nodes)
        if folder is None:
            folder = claim(plain, self._launch_folder, chosen, datetime.now())
        tags = {"bc2exp.nnodes": str(nodes.count)} if nodes.count > 1 else {}
        if is_rehearsal(plain):
            tags["bc2exp.rehearsal"] = "true"
        with folder.lock:
            return run_on_ranks(folder, plain, overrides, self._launch_folder, tags, conversation)


def complain(problems: list[str]) -> int:
    """Print every mistake, a line each; returns the exit code."""
    number = len(problems)
    print(f"bc2exp: {number} mistake{'s' * (number > 1)}; nothing was started or written", file=sys.stderr)
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    return WRONG


if __name__ == "__main__":
    main()
