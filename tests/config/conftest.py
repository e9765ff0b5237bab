"""Compositions of the configuration, kept for the session, and a folder that must stay as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from bc2exp.config.checks import check
from bc2exp.config.composition import prepare_search_path
from bc2exp.config.overrides import assign
from bc2exp.config.register import register
from bc2exp.config.roots import data_root


@cache
def _composed(*overrides: str) -> DictConfig:
    register()
    prepare_search_path(Path(__file__).parent)
    with initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.fixture(scope="session")
def composed() -> Callable[..., DictConfig]:
    """Hydra's own composition of some overrides, each one made once: composed("model=tiny_13b")."""
    return lambda *overrides: copy.deepcopy(_composed(*overrides))


@pytest.fixture
def checked(composed: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., list[str]]:
    """What the checks say of groups and values, with tmp_path as folder: checked("model=x", {"seed": 1})."""

    def say(*groups_and_values: str | dict[str, object]) -> list[str]:
        config = composed(*(part for part in groups_and_values if isinstance(part, str)))
        for part in groups_and_values:
            for key, value in part.items() if isinstance(part, dict) else ():
                assert assign(config, key, value) is None, f"{key}={value} never reaches the checks"
        return check(config, tmp_path)

    return say


@pytest.fixture
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of a test, with a file in it; whatever the test does must leave it as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mine.txt").write_text("one line\n", encoding="utf-8")
    yield tmp_path
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "one line\n"
