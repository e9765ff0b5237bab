"""The flags of the command line: Hydra's, refused where Hydra itself would end in a traceback."""

from __future__ import annotations

from argparse import Namespace

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from bc2exp.config.overrides import leaf, parse_word

_MODES = {"run": "--run", "multirun": "-m", "cfg": "--cfg", "info": "--info", "shell_completion": "-sc"}
_SHELLS = ("bash", "zsh", "fish")


def read_flags(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """Split a command line into Hydra's options and the flags as typed; flags may stand between overrides.

    Ends the process with code 2 and a usage line where a flag is unknown.
    """
    parser = get_args_parser()
    parser.prog = "bc2exp"
    options = parser.parse_intermixed_args(arguments)
    return options, [argument for argument in arguments if argument not in options.overrides]


def refuse_flags(options: Namespace) -> list[str]:
    """Every sentence that speaks against the flags."""
    problems = []
    if options.config_path or options.config_name or options.config_dir:
        problems.append(
            "--config-path, --config-name, --config-dir: there is one root configuration; put groups or "
            "experiments/ of your own into the working folder"
        )
    if options.experimental_rerun:
        problems.append("--experimental-rerun: type the command again; an unfinished run is continued")
    modes = [flag for name, flag in _MODES.items() if getattr(options, name) not in (None, False)]
    if len(modes) > 1:
        problems.append(f"{', '.join(modes)}: only one of these at a time")
    # Hydra's own part has values that only a running job has
    if options.resolve and not (options.cfg == "job" or options.help):
        problems.append("--resolve: belongs to --cfg job")
    if options.package and options.cfg != "job":
        problems.append("--package: belongs to --cfg job")
    if options.shell_completion:
        words = [parse_word(text) for text in options.overrides]
        known = len(words) == 1 and words[0].key in ("install", "uninstall", "query")
        if not known or words[0].value not in _SHELLS:
            problems.append(f"-sc: write -sc install={'|'.join(_SHELLS)}, or uninstall=")
    return problems


def refuse_package(options: Namespace, config: DictConfig) -> list[str]:
    """The sentence against `--cfg job --package x` where the configuration has no x."""
    if options.package in (None, "_global_") or leaf(config, options.package):
        return []
    parts = ", ".join(map(str, config))
    return [f"--package {options.package}: the configuration has no such part; it has {parts}"]
