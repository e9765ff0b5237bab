"""A training so small that it takes a second: the words of its command line, and its configuration."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from bc2exp.config.load import finalize, read
from bc2exp.config.preflight import preflight
from bc2exp.config.root import Config

SMALL = (
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_heads=4",
    "model.num_layers=2",
    "dataset.sequence_length=32",
    "task.global_batch=8",
    "task.eval_samples=8",
    "tracking.enabled=false",
)


def small_words(*words: str) -> list[str]:
    """The command line of the small training with `words`; what they set again is left out before them, and
    with another task the keys of the training."""
    keys = tuple(word.partition("=")[0] for word in words)
    others = "task." if "task" in keys and "task=pretrain" not in words else "\0"
    kept = (word for word in SMALL if word.partition("=")[0] not in keys and not word.startswith(others))
    return [*kept, *words]


def small_plain(folder: Path, *words: str) -> dict:
    """The small configuration with `words` of the command line, resolved, as the parent knows it."""
    checked = preflight(small_words(*words), sweep=False, folder=folder)
    assert not checked.problems, checked.problems
    return finalize(checked.jobs[0], folder)


def small_config(folder: Path, *words: str) -> Config:
    """The small configuration, as ranks read it from `folder`, where it is left as `resolved.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "resolved.yaml"
    path.write_text(OmegaConf.to_yaml(small_plain(folder, *words)))
    return read(path)
