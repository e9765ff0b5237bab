"""The check before Hydra starts: compose every job of a command line, collect every mistake, write nothing.

Hydra alone stops at the first bad key, exits 1 and leaves folders behind. Here each override is tried on
its own against the composed groups, so that three typos are told as three.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from bc2exp.config.checks import check
from bc2exp.config.overrides import Word, assign, expectation, leaf, parse_word, quote_for
from bc2exp.config.register import register
from bc2exp.config.roots import data_root

OWN_GROUPS = ("model", "hardware", "parallelism", "dataset", "task", "experiments")
MAX_JOBS_CHECKED = 256


@dataclass
class Preflight:
    """What a command line comes to.

    Attributes:
        overrides: the command line as Hydra must read it (text values quoted).
        jobs: one composed configuration a job; more than one only under `-m`.
        problems: a sentence each; where there are any, nothing may be started.
    """

    overrides: list[str] = field(default_factory=list)
    jobs: list[DictConfig] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def prepare_search_path(folder: Path) -> None:
    """Tell the root YAML where experiments/ and the groups of the working folder lie."""
    os.environ["BC2EXP_EXPERIMENTS_ROOT"] = str(data_root())
    os.environ["BC2EXP_WORKING_FOLDER"] = str(folder)


def preflight(arguments: Sequence[str], *, sweep: bool, folder: Path) -> Preflight:
    """Compose and check a command line.

    Args:
        arguments: the overrides as typed.
        sweep: `-m` was given.
        folder: relative paths count from here.
    """
    register()
    prepare_search_path(folder)
    _compose_groups.cache_clear()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        try:
            return _preflight([parse_word(text) for text in arguments], sweep, folder)
        finally:
            _compose_groups.cache_clear()


def _preflight(words: list[Word], sweep: bool, folder: Path) -> Preflight:
    result = Preflight()
    groups, values = [], []
    for word in words:
        problem = _grammar(word)
        if problem:
            result.problems.append(problem)
        elif _is_group(word.key):
            result.problems += _unknown_choices(word, sweep)
            groups.append(word)
        else:
            values.append(word)
    if any(problem for problem in result.problems if problem.partition("=")[0] in OWN_GROUPS):
        groups = []  # keys are still checked, against the default groups
    group_jobs = list(_expand([word.text for word in groups], sweep))
    bases: list[DictConfig] = []
    for choices in group_jobs[:MAX_JOBS_CHECKED]:
        try:
            bases.append(_compose_groups(choices))
        except (HydraException, OmegaConfBaseException) as error:
            result.problems.append(" ".join(str(error).split()))
    if not bases:
        return result
    quoted = {word: _quoted(word, bases, sweep) for word in values}
    result.overrides = [quoted[word] if word in quoted else word.text for word in words if word in quoted or word in groups]
    for word in values:
        result.problems += _refusals(word, quoted[word], bases, sweep)
    if result.problems:
        result.problems = list(dict.fromkeys(result.problems))
        return result
    _check_jobs(result, groups, [quoted[word] for word in values], sweep, folder)
    return result


def _check_jobs(result: Preflight, groups: list[Word], values: list[str], sweep: bool, folder: Path) -> None:
    """Compose each job of the product of all sweeps and check it as a whole."""
    texts = [word.text for word in groups] + values
    for job in itertools.islice(_expand(texts, sweep), MAX_JOBS_CHECKED):
        config = copy.deepcopy(_compose_groups(job[: len(groups)]))
        for text in job[len(groups) :]:
            override = OverridesParser.create().parse_override(text)
            assign(config, parse_word(text).key, override.value())
        result.jobs.append(config)
        result.problems += check(config, folder)
    result.problems = list(dict.fromkeys(result.problems))


def _grammar(word: Word) -> str | None:
    """What is wrong with the shape of an override, if anything."""
    if word.prefix == "~":
        return f"{word.text}: a key cannot be deleted; set it to null where the schema allows it"
    if word.value is None:
        return f"{word.text}: is no override; write key=value"
    if not word.key.strip():
        return f"{word.text}: has no key; write key=value"
    if word.prefix == "+" and not word.key.startswith("hydra"):
        return f"{word.text}: '+' adds keys, and every key is known already; write {word.text[1:]}"
    return None


def _is_group(key: str) -> bool:
    return key in OWN_GROUPS or key.startswith(("hydra.", "hydra/"))


def options(group: str) -> list[str]:
    """The choices of a group, schemas left out."""
    loader = GlobalHydra.instance().config_loader()
    found = loader.get_group_options(group)
    if group == "experiments":  # <study>/<file>
        for study in loader.get_group_options("experiments", results_filter=None):
            found += [f"{study}/{name}" for name in loader.get_group_options(f"experiments/{study}")]
    return sorted(name for name in set(found) if not name.endswith("schema"))


def _unknown_choices(word: Word, sweep: bool) -> Iterator[str]:
    if word.key.startswith("hydra") or word.value is None:
        return
    known = options(word.key)
    try:
        chosen = [parse_word(job[0]).value or "" for job in _expand([word.text], sweep)]
    except HydraException:
        chosen = [word.value]
    for choice in chosen:
        if choice in known or (word.key == "experiments" and choice == "null"):
            continue
        near = difflib.get_close_matches(choice, known, n=1, cutoff=0.4)
        hint = f"nearest: {near[0]}; " if near else ""
        yield f"{word.key}={choice}: no such choice; {hint}there are {', '.join(known) or 'none'}"


@lru_cache(maxsize=MAX_JOBS_CHECKED)
def _compose_groups(overrides: tuple[str, ...]) -> DictConfig:
    return compose("config", overrides=list(overrides))


def _quoted(word: Word, bases: list[DictConfig], sweep: bool) -> str:
    """The override as Hydra must read it, judged by the first composition that knows the key."""
    assert word.value is not None
    for base in bases:
        found = leaf(base, word.key)
        if found is not None:
            return f"{word.prefix}{word.key}={quote_for(found[2], word.value, sweep=sweep)}"
    return word.text


def _parse(text: str) -> Override:
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(config_loader=loader).parse_override(text)


def _expand(texts: list[str], sweep: bool) -> Iterator[tuple[str, ...]]:
    """The jobs of a command line: the product of the sweeps in it; one job without `-m`."""
    if not sweep:
        yield tuple(texts)
        return
    axes: list[list[str]] = []
    for text in texts:
        override = _parse(text)
        if not override.is_sweep_override():
            axes.append([text])
        elif override.is_discrete_sweep():
            prefix = text.partition("=")[0]
            axes.append([f"{prefix}={choice}" for choice in override.sweep_string_iterator()])
        # a continuous interval belongs to the sweeper: no one value of it can be composed here
        else:
            axes.append([])
    yield from itertools.product(*(axis for axis in axes if axis))


def _refusals(word: Word, quoted: str, bases: list[DictConfig], sweep: bool) -> Iterator[str]:
    """Why a value override is refused: unknown key, unreadable value, wrong type."""
    known = [base for base in bases if leaf(base, word.key) is not None]
    if len(known) < len(bases):
        yield _unknown_key(word, bases)
        return
    found = leaf(known[0], word.key)
    assert found is not None
    try:
        values = [_parse(job[0]).value() for job in _expand([quoted], sweep)]
        if not sweep and _parse(quoted).is_sweep_override():
            raise HydraException("a sweep")
    except HydraException:
        hint = " (several values need -m)" if not sweep and "," in (word.value or "") else ""
        yield f"{word.text}: must be {expectation(*found)}{hint}"
        return
    for base, value in itertools.product(known, values):
        reason = assign(copy.deepcopy(base), word.key, value)
        if reason:
            yield f"{word.key}={'null' if value is None else value}: {reason}"


def _unknown_key(word: Word, bases: list[DictConfig]) -> str:
    """The sentence for a key that no schema has, with the nearest one that exists."""
    known = list(OWN_GROUPS) + sorted({key for base in bases for key in keys(base)})
    near = difflib.get_close_matches(word.key, known, n=1, cutoff=0.6)
    if not near:  # the right name in the wrong place, or a name without its place
        ends = [key for key in known if key.rpartition(".")[2] == word.key.rpartition(".")[2]]
        near = ends[:1]
    hint = f"nearest: {near[0]}" if near else "`python -m bc2exp --cfg job` prints every key"
    return f"{word.text}: no such key; {hint}"


def keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration, groups of keys included."""
    with open_dict(config):
        for name in config:
            yield f"{prefix}{name}"
            child = config._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none():
                yield from keys(child, f"{prefix}{name}.")


def to_plain(config: DictConfig) -> dict[str, object]:
    """A composed configuration as plain, resolved data: enums by name."""
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
