"""The check before Hydra starts: compose every job of a command line, collect every mistake, write nothing.

Hydra alone stops at the first bad key, exits 1 and leaves folders behind. Here each override is tried on
its own against the composed groups, so that three typos are told as three; what is left of the command line
without them is then checked as a whole.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, StringNode

from bc2exp.config.checks import check, layout_problems, leaves
from bc2exp.config.composition import (
    OWN_GROUPS,
    compose_groups,
    options,
    prepare_search_path,
    refuse_choice,
    tasks_with,
    unknown_key,
)
from bc2exp.config.errors import UserError
from bc2exp.config.fields import field_of
from bc2exp.config.hydra_settings import (
    PLUGIN_GROUPS,
    is_folder,
    is_plugin_setting,
    quote_folder,
    refuse_folder,
    refuse_setting,
)
from bc2exp.config.nodes import shared_folder
from bc2exp.config.overrides import (
    MAX_JOBS,
    Reading,
    Word,
    assign,
    expectation,
    leaf,
    parse,
    parse_word,
    quote_choice,
    quote_list,
    quote_text,
    read_word,
)
from bc2exp.config.register import register
from bc2exp.config.roots import data_root

ENOUGH = 20
"""A sweep is not checked further once so many mistakes were found."""


@dataclass
class Preflight:
    """What a command line comes to.

    Attributes:
        overrides: the command line as Hydra must read it (text values quoted), in the order typed.
        jobs: one composed configuration a job; more than one only under `-m`. Of a sweep some, but not all,
            may have a layout that cannot be.
        problems: a sentence each; where there are any, the other two are empty and nothing may be started.
    """

    overrides: list[str] = field(default_factory=list)
    jobs: list[DictConfig] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def preflight(arguments: Sequence[str], *, sweep: bool, folder: Path) -> Preflight:
    """Compose and check a command line.

    Args:
        arguments: the overrides as typed.
        sweep: `-m` was given.
        folder: relative paths count from here.
    """
    register()
    prepare_search_path(folder)
    compose_groups.cache_clear()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        inspection = _Inspection(sweep, folder)
        jobs = inspection.jobs([parse_word(text) for text in arguments])
    compose_groups.cache_clear()
    problems = [_one_line(problem) for problem in dict.fromkeys(inspection.problems)]
    if problems:
        return Preflight(problems=problems)
    return Preflight([inspection.texts[text] for text in arguments], jobs)


class _Inspection:
    """One command line under inspection.

    Attributes:
        problems: the sentences found so far.
        blamed: the keys they are about: a contradiction that may follow from one of these is not told.
        texts: each override as typed, and as Hydra must read it.
    """

    def __init__(self, sweep: bool, folder: Path) -> None:
        self.sweep, self.folder = sweep, folder
        self.problems: list[str] = []
        self.blamed: set[str] = set()
        self.texts: dict[str, str] = {}

    def jobs(self, words: list[Word]) -> list[DictConfig]:
        """Every job that the sound part of the command line comes to."""
        sound = self._sound(words)
        groups = [reading for word in sound if _is_group(word.key) for reading in self._read_group(word)]
        bases = self._compose(_each_choice_once(groups), *(reading.word.key for reading in groups))
        trusted = not any(_is_group(key) for key in self.blamed)
        bases = bases or self._compose([()])
        if not bases:
            return []
        task_known = not self.blamed & {"task", "experiments"}
        values = []
        for word in sound:
            if is_folder(word.key):
                self._read_folder(word, bases[0])
            elif not _is_group(word.key) and (task_known or not tasks_with(word.key)):
                values += self._read_value(word, bases)
        self._require_sweeper(groups, values)
        if not trusted:
            return []
        # A command line that is refused already is checked only as far as its groups are composed already.
        few = itertools.islice(_each_choice_once([*groups, *values]), len(bases))
        return self._compose_jobs(groups, values, few if self.problems else None)

    def _compose(self, selections: Iterable[tuple[str, ...]], *keys: str) -> list[DictConfig]:
        """What selections of groups come to; for one that is broken, its keys are blamed."""
        bases = []
        for choices in selections:
            try:
                bases.append(copy.deepcopy(compose_groups(choices, self.folder)))
            except UserError as error:
                self._blame(str(error), *keys)
        return bases

    def _blame(self, problem: str, *keys: str) -> None:
        self.problems.append(problem)
        self.blamed.update(keys)

    def _sound(self, words: list[Word]) -> list[Word]:
        """The words that are overrides of a kind that is taken here, each key once."""
        sound: dict[str, Word] = {}
        for word in words:
            reason = refuse_setting(word, sweep=self.sweep) or _misshapen(word, self.folder)
            if reason is None and word.key in sound:
                reason = f"{word.key}: given twice, as {sound[word.key].value} and as {word.value}; keep one"
            if reason is None:
                sound[word.key] = word
            else:
                self._blame(reason, word.key)
        return list(sound.values())

    def _read_group(self, word: Word) -> list[Reading]:
        """A choice of a group, a sweep of choices, or a setting of a sweep's plugin; empty where refused."""
        settings = is_plugin_setting(word.key)
        try:
            pattern = parse(word.text).value() if (word.value or "").startswith("glob(") else None
            if isinstance(pattern, Glob) and self.sweep:
                # Hydra's own glob finds the schemas as well, and no experiment
                known = options(word.key, self.folder)
                found = pattern.filter(known)
                if not found:
                    self._blame(f"{word.text}: fits none of {', '.join(known)}", word.key)
                word = Word(word.text, "", word.key, ",".join(found))
            reading = read_word(word, None if settings else quote_choice, sweep=self.sweep)
        except (HydraException, ValueError):
            self._blame(f"{word.text}: cannot be read", word.key)
            return []
        for job in () if settings or word.key in self.blamed else reading.jobs:
            value = parse(job).value()
            choice = value if isinstance(value, str) else str(parse_word(job).value)
            reason = refuse_choice(word.key, choice, self.folder)
            if reason:
                several = not self.sweep and "," in job
                self._blame(reason + (" (several choices need -m)" if several else ""), word.key)
        self.texts[word.text] = reading.text
        return [] if word.key in self.blamed else [reading]

    def _read_folder(self, word: Word, config: DictConfig) -> None:
        """A folder that Hydra is told of."""
        self.texts[word.text] = f"{word.key}={quote_folder(word)}"
        reason = refuse_folder(word, self.folder, config)
        if reason:
            self._blame(reason, word.key)

    def _read_value(self, word: Word, bases: list[DictConfig]) -> list[Reading]:
        """The value of a key, tried on each composition (and left there); empty where one refuses it."""
        places = [place for base in bases if (place := leaf(base, word.key)) is not None]
        if len(places) < len(bases):
            self._blame(*unknown_key(word, bases))
            return []
        parent, name, node = places[0]
        declared = field_of(parent, name)
        form = declared.metadata["form"] if declared is not None else ""
        if isinstance(node, DictConfig) and not form:
            first = next(iter(leaves(node, f"{word.key}.")))[0]
            self._blame(f"{word.text}: is a group of keys; set them singly ({first}=...)", word.key)
            return []
        try:
            # A value that may be a list or a mapping is text where it does not begin as one of these.
            is_text = isinstance(node, StringNode) or (form and (word.value or "")[:1] not in "[{")
            quoting = quote_text if is_text else None
            if isinstance(node, ListConfig) and node._metadata.element_type is str and not self.sweep:
                quoting = quote_list
            reading = read_word(word, quoting, sweep=self.sweep)
        except (HydraException, ValueError) as error:
            hint = "" if isinstance(error, HydraException) else f" ({error})"
            self._blame(f"{word.text}: must be {expectation(*places[0])}{hint}", word.key)
            return []
        if len(reading.jobs) > MAX_JOBS:
            self._blame(f"{word.text}: more than {MAX_JOBS} jobs; split the sweep", word.key)
            return []
        for base, job in itertools.product(bases, reading.jobs):
            reason = assign(base, word.key, parse(job).value())
            if reason:
                self._blame(f"{word.text if len(reading.jobs) == 1 else job}: {reason}", word.key)
        self.texts[word.text] = reading.text
        return [] if word.key in self.blamed else [reading]

    def _require_sweeper(self, groups: list[Reading], values: list[Reading]) -> None:
        if any(reading.word.key == "hydra/sweeper" for reading in groups):
            return
        for reading in values:
            if reading.interval:
                self._blame(
                    f"{reading.text}: needs a sweeper that draws values (hydra/sweeper=optuna); "
                    "without one name them: a,b,c or range(start,stop,step)",
                    reading.word.key,
                )

    def _compose_jobs(
        self, groups: list[Reading], values: list[Reading], jobs: Iterable[tuple[str, ...]] | None
    ) -> list[DictConfig]:
        """Some jobs, or each of the product of all sweeps, checked as a whole."""
        axes = [reading.jobs for reading in (*groups, *values)]
        if math.prod(len(axis) for axis in axes) > MAX_JOBS:
            self._blame(f"-m: more than {MAX_JOBS} jobs; split the sweep")
            return []
        configs = []
        impossible: list[list[str]] = []
        for job in jobs or itertools.product(*axes):
            if len(self.problems) > ENOUGH:
                break
            try:
                config = copy.deepcopy(compose_groups(job[: len(groups)], self.folder))
            except UserError as error:
                self._blame(str(error))
                continue
            for text in job[len(groups) :]:
                assign(config, parse_word(text).key, parse(text).value())
            configs.append(config)
            problems = check(config, self.folder) or shared_folder(config, self.texts, sweep=self.sweep)
            if self.sweep and problems and problems == layout_problems(config, self.folder):
                impossible.append(problems)  # a product of values has such corners
            else:
                self._tell(problems)
        if len(impossible) == len(configs):
            self._tell(problem for problems in impossible for problem in problems)
        return configs

    def _tell(self, problems: Iterable[str]) -> None:
        """Note what speaks against a job, but for what follows from another mistake."""
        for problem in problems:
            consequence = any("." in key and key in problem for key in self.blamed)
            if not consequence and problem not in self.problems:
                self.problems.append(problem)


def _one_line(text: str) -> str:
    """A sentence that prints on one line, whatever was typed."""
    return text.replace("\n", "\\n").encode("utf-8", "backslashreplace").decode()


def _is_group(key: str) -> bool:
    """Whether Hydra must know the override before anything is composed."""
    return key in OWN_GROUPS or key in PLUGIN_GROUPS or is_plugin_setting(key)


def _misshapen(word: Word, folder: Path) -> str | None:
    """What is wrong with the shape of an override, if anything."""
    try:
        word.text.encode()
    except UnicodeEncodeError:
        return f"{word.text}: is not UTF-8; rename the file or write the text in UTF-8"
    if word.prefix == "~":
        return f"{word.text}: a key cannot be deleted; set it to null where the schema allows it"
    if word.value is None:
        group = next((group for group in OWN_GROUPS if word.text in options(group, folder)), None)
        meant = f"{group}={word.text}" if group else "key=value, without spaces"
        return f"{word.text or 'an empty word'}: is no override; write {meant}"
    if not word.key.strip():
        return f"{word.text}: has no key; write key=value, without spaces"
    if word.prefix:
        plain = word.text[len(word.prefix) :]
        return f"{word.text}: '{word.prefix}' adds keys, and every key is known already; write {plain}"
    if "@" in word.key:
        plain = f"{word.key.partition('@')[0]}={word.value}"
        return f"{word.text}: the place of a group is fixed; write {plain}"
    return None


def _each_choice_once(groups: list[Reading]) -> Iterator[tuple[str, ...]]:
    """As few selections as show every choice of every group: enough to judge keys and values singly."""
    for number in range(max((len(reading.jobs) for reading in groups), default=1)):
        yield tuple(reading.jobs[number % len(reading.jobs)] for reading in groups)
