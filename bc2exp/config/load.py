"""From a composed configuration to plain data, and from `resolved.yaml` back to typed objects."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bc2exp.config.fields import field_of
from bc2exp.config.root import Config
from bc2exp.config.roots import absolute
from bc2exp.config.secrets import withdraw
from bc2exp.config.tasks import TASKS


def finalize(config: DictConfig, folder: Path) -> dict[str, Any]:
    """The configuration as ranks read it: resolved, enums by name, every path absolute, no password.

    Args:
        config: a composed configuration that passed `checks.check`.
        folder: relative paths count from here.
    """
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    _make_absolute(config, plain, folder)
    task, tracking = plain["task"], plain["tracking"]
    if tracking["uri"] is not None:  # a YAML file may have a password in it
        tracking["uri"] = withdraw(tracking["uri"])
    if task.get("resume") not in (None, "auto", "never"):
        task["resume"] = str(absolute(task["resume"], folder))
    return {str(key): value for key, value in plain.items()}


def _make_absolute(node: DictConfig, plain: Any, folder: Path) -> None:
    for name in node:
        child, declared = node._get_node(name), field_of(node, str(name))
        if declared is not None and declared.metadata["path"]:
            plain[name] = _absolute(plain[name], folder)
        elif isinstance(child, DictConfig):
            _make_absolute(child, plain[name], folder)


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {name: _absolute(each, folder) for name, each in value.items()}
    if isinstance(value, list):
        return [_absolute(each, folder) for each in value]
    return value if value is None else str(absolute(value, folder))


def digest(plain: dict[str, Any]) -> str:
    """Twelve hex digits that two runs share exactly when they compute the same thing.

    Left out: where it is recorded (`tracking`), on which machines (`launch`), how it was started
    (`task.resume`, `task.accept_changes`, `sweep`), how its checkpoints are written, and where and by how
    many processes its data are prepared.
    """
    text = json.dumps(_computed(plain), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _computed(plain: dict[str, Any]) -> dict[str, Any]:
    left_out = {"task": ("resume", "accept_changes", "save_beside"), "dataset": ("cache", "workers")}
    rest = {key: value for key, value in plain.items() if key not in ("tracking", "launch", "sweep")}
    for group, names in left_out.items():
        if group in rest:  # a comparison has no data of its own
            rest[group] = {key: value for key, value in rest[group].items() if key not in names}
    return rest


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value here, value there) of what makes two configurations two runs: the digest's business."""
    mine, others = flat(_computed(here)), flat(_computed(there))
    keys = dict.fromkeys([*mine, *others])
    return [(key, mine.get(key), others.get(key)) for key in keys if mine.get(key) != others.get(key)]


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a configuration."""
    if not isinstance(node, dict):
        return {prefix: node}
    parts = (flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items())
    return {key: value for part in parts for key, value in part.items()}


def read(path: Path) -> Config:
    """The typed configuration of a run folder's `resolved.yaml`."""
    # Written by OmegaConf.to_yaml, which quotes what its reader would take for something else (the text 1e3).
    plain = OmegaConf.load(path)
    assert isinstance(plain, DictConfig)
    return typed(plain)


def typed(plain: DictConfig) -> Config:
    """The typed configuration of plain data."""
    schema = OmegaConf.structured(Config)
    schema.task = OmegaConf.structured(TASKS[plain["task"]["name"]])
    config = OmegaConf.to_object(OmegaConf.merge(schema, plain))
    assert isinstance(config, Config)
    return config
