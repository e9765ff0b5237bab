"""The groups: which choices and keys there are, and what a selection of choices composes to.

A YAML file may hold the same mistakes as a command line, a user's own file above all; what Hydra, OmegaConf
and the YAML parser say about it becomes one sentence that names the file and the key.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from bc2exp.config.errors import UserError
from bc2exp.config.hydra_settings import PLUGIN_GROUPS
from bc2exp.config.overrides import MAX_JOBS, Word, expectation, leaf
from bc2exp.config.root import GROUPS
from bc2exp.config.roots import data_root
from bc2exp.config.tasks import TASKS

OWN_GROUPS = (*GROUPS, "experiments")


def prepare_search_path(folder: Path) -> None:
    """Tell the root YAML where experiments/ and the groups of the working folder lie."""
    os.environ["BC2EXP_EXPERIMENTS_ROOT"] = str(data_root())
    os.environ["BC2EXP_WORKING_FOLDER"] = str(folder)


def options(group: str, folder: Path) -> list[str]:
    """The choices of a group, schemas left out; of experiments, `<study>/<file>`."""
    if group in PLUGIN_GROUPS:
        return sorted(GlobalHydra.instance().config_loader().get_group_options(group))
    # Hydra's own list leaves out what comes by a search path: experiments/ and the working folder
    pattern = "*/*.yaml" if group == "experiments" else "*.yaml"
    folders = [place / group for place in _places(folder)]
    found = {file.relative_to(place) for place in folders for file in place.glob(pattern)}
    return sorted(file.with_suffix("").as_posix() for file in found)


def refuse_choice(group: str, choice: str, folder: Path) -> str | None:
    """Why a choice of a group cannot be taken, in words; None where it can."""
    known = options(group, folder)
    if choice not in known:
        if (group, choice) == ("hydra/sweeper", "optuna"):
            return f"{group}={choice}: is not installed; pip install 'bc2exp[sweep]'"
        if group == "experiments" and choice.lower() == "null":
            return f"{group}={choice}: no experiment is the default; leave the key out"
        there_are = f"there are {', '.join(known) or 'none'}"
        return f"{group}={choice}: no such choice; {nearest(choice, known, 0.4)}{there_are}"
    own = folder / group / f"{choice}.yaml"
    used = _file_of(f"{group}/{choice}", folder)
    if own.is_file() and used is not None and not own.samefile(used):
        return f"{group}={choice}: would read {used} and not {own}; give your file another name"
    return None


def nearest(name: str, known: list[str], cutoff: float) -> str:
    """`nearest: x; ` with the known name that is most alike, or nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"nearest: {near[0]}; " if near else ""


@lru_cache(maxsize=MAX_JOBS)
def compose_groups(overrides: tuple[str, ...], folder: Path) -> DictConfig:
    """The configuration that a selection of groups comes to; not to be changed, as it is kept.

    Raises:
        UserError: a file of the selection is wrong.
    """
    try:
        config = compose("config", overrides=list(overrides), return_hydra_config=True)
    except Exception as error:  # whatever Hydra, OmegaConf, PyYAML or the file system make of a user's file
        raise UserError(_explain(error, overrides, folder)) from None
    with open_dict(config):
        own = config.pop("hydra")
    if own.mode is not None or own.sweeper.get("params"):
        # Hydra would start a sweep that nobody has checked, or pass over it without a word.
        raise UserError(
            f"{' '.join(overrides)}: a file sets hydra.mode or hydra.sweeper.params; "
            "name a sweep on the command line: -m key=a,b"
        )
    return config


def _explain(error: Exception, overrides: tuple[str, ...], folder: Path) -> str:
    """One sentence for a failed composition: the file, the key, what would be right."""
    if (mark := getattr(error, "problem_mark", None)) is not None:  # of PyYAML, through OmegaConf
        return f"{mark.name}, line {mark.line + 1}: is not YAML: {getattr(error, 'problem', error)}"
    if isinstance(error, UnicodeDecodeError):
        return f"{_not_utf8(overrides, folder) or ' '.join(overrides)}: is not UTF-8; save the file as UTF-8"
    text = str(error) or str(error.__cause__)
    if not overrides:  # not even the default groups compose: there are no keys to compare with
        return " ".join(text.split())
    named = re.search(r"In '(.+?)'", text)
    file = _file_of(named[1], folder) if named and named[1] != "config" else None
    where = str(file or " ".join(overrides))
    key = re.search(r"full_key: (\S.*)", text)
    if key and key[1] == "experiments":
        return f"{where}: its first line must be `# @package _global_`; without it the keys are not found"
    if key and tasks_with(key[1]) and "not in '" in text:
        return f"{where}: {key[1]}: belongs to task={','.join(tasks_with(key[1]))}; name it in the defaults"
    if key and "not in '" in text:
        every = set(keys(compose_groups((), folder)))
        every.update(*(keys(OmegaConf.structured(schema), "task.") for schema in TASKS.values()))
        hint = nearest(key[1], sorted(every), 0.6)
        return f"{where}: {key[1]}: no such key; {hint}".removesuffix("; ")
    if key:
        found = leaf(compose_groups((), folder), key[1])
        if found is not None:
            return f"{where}: {key[1]}: must be {expectation(*found)}"
    group = re.search(r"Could not override '(.+?)'", text)
    if group:
        hint = nearest(group[1], list(OWN_GROUPS), 0.6)
        return f"{where}: {group[1]}: no such group or key; {hint}".removesuffix("; ")
    choice = re.search(r"Could not (?:find|load) '(.+)/(.+?)'", text)
    if choice:
        known = options(choice[1], folder)
        return (
            f"{where}: asks for {choice[1]}={choice[2]}: no such choice; {nearest(choice[2], known, 0.4)}"
            f"there are {', '.join(known) or 'none'}"
        )
    return f"{where}: {' '.join(text.partition('full_key:')[0].split())}"


def _file_of(name: str, folder: Path) -> Path | None:
    """The YAML file that Hydra reads for `<group>/<choice>`: its first on the search path."""
    return next((file for place in _places(folder) if (file := place / f"{name}.yaml").is_file()), None)


def _places(folder: Path) -> tuple[Path, ...]:
    """The search path of conf/config.yaml."""
    return (data_root() / "conf", data_root(), folder)


def _not_utf8(overrides: tuple[str, ...], folder: Path) -> Path | None:
    for text in overrides:
        group, _, choice = text.partition("=")
        file = _file_of(f"{group}/{choice.strip(chr(39))}", folder)
        try:
            if file is not None:
                file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return file
    return None


def keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration, groups of keys included."""
    with open_dict(config):
        for name in map(str, config):
            yield f"{prefix}{name}"
            child = config._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none():
                yield from keys(child, f"{prefix}{name}.")


def tasks_with(key: str) -> list[str]:
    """The tasks whose schema has a key `task.*`."""
    group, _, rest = key.partition(".")
    if group != "task" or not rest:
        return []
    return [name for name, schema in TASKS.items() if leaf(OmegaConf.structured(schema), rest)]


def unknown_key(word: Word, bases: list[DictConfig]) -> tuple[str, str, str]:
    """The sentence for a key that a composition lacks, with the nearest there is; and the keys to blame."""
    name = word.key.replace("/", ".")
    if owners := tasks_with(name):
        lacking = sorted({base.task.name for base in bases if leaf(base, name) is None})
        problem = f"{word.text}: task={','.join(lacking)} has no such key; task={','.join(owners)} has"
        return problem, word.key, word.key
    known = sorted({key for base in bases for key in keys(base)}.union(OWN_GROUPS))
    known = [key for key in known if ("." in key) == ("." in name)]
    hint = nearest(name, known, 0.6)
    if not hint:  # a name without its place, or in the wrong one
        hint = nearest(name, [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]], 0.0)
    near = hint.removeprefix("nearest: ").removesuffix("; ")
    shown = f"nearest: {near}" if near else "`python -m bc2exp --cfg job` prints every key"
    return f"{word.text}: no such key; {shown}", word.key, near or word.key
