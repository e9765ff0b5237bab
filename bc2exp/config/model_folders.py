"""Which model a folder means: published weights, a run, or a checkpoint of one. Asked at the door, and again
when it is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bc2exp.config.errors import UserError
from bc2exp.config.roots import absolute, nearest
from bc2exp.config.weight_files import MEGATRON, weight_kind

CONFIG, MANIFEST, RESOLVED = "config.json", "manifest.json", "resolved.yaml"
_NAME = re.compile(r"[\w.+-]*\w[\w.+-]*")


@dataclass(frozen=True)
class ModelFolder:
    """Where the weights of a model lie.

    Attributes:
        weights: a folder in the published layout, or of a checkpoint.
        run: the run of a checkpoint, whose `resolved.yaml` says what model it is of; None: published layout.
        tokenizer: the tokenizer that lies with published weights, where one does.
    """

    weights: Path
    run: Path | None
    tokenizer: Path | None


def find_model_folder(path: Path, key: str) -> ModelFolder:
    """What lies in a folder.

    Args:
        path: published weights (config.json and .safetensors or .bin), a run (its exported weights, else its
            newest checkpoint), or a checkpoint inside a run.
        key: what errors begin with, `task.model=FOLDER`.

    Raises:
        UserError: none of these lies there.
    """
    if not path.is_dir():
        raise UserError(f"{key}: no such folder{nearest(path)}")
    if (path / RESOLVED).is_file():
        return _of_run(path, key)
    if (path / MANIFEST).is_file():
        run = path.parent.parent
        if not (run / RESOLVED).is_file():
            raise UserError(
                f"{key}: is a checkpoint outside of its run, whose {RESOLVED} would say what model it is of; "
                "name it where it was saved"
            )
        return ModelFolder(path, run, None)
    try:
        kind = weight_kind(path)
    except ValueError:
        kind = None
    if kind is not None and (path / CONFIG).is_file():
        tokenizer = path / "tokenizer.model"
        return ModelFolder(path, None, tokenizer if tokenizer.is_file() else None)
    if kind == MEGATRON:
        raise UserError(
            f"{key}: shards of ModelLink do not say what model they are of; make a folder of published "
            f"weights of them (task=convert task.source={path} task.target=FOLDER task.format=hf)"
        )
    raise UserError(
        f"{key}: holds no model: neither published weights ({CONFIG} and .safetensors or .bin) nor a run nor "
        "a checkpoint of one"
    )


def _of_run(run: Path, key: str) -> ModelFolder:
    if (run / "weights" / CONFIG).is_file():
        return find_model_folder(run / "weights", key)
    checkpoints = sorted(path for path in (run / "checkpoints").glob("step-*") if (path / MANIFEST).is_file())
    if not checkpoints:
        raise UserError(f"{key}: this run has left neither weights nor a checkpoint")
    return ModelFolder(checkpoints[-1], run, None)


def named_models(value: Any, model: str) -> dict[str, str | None]:
    """The models that `task.models` means, by name; None is the model of this configuration.

    Args:
        value: null, a folder, a list of folders and nulls, or a mapping of names to such.
        model: `model.name`, by which a model without a folder and a name goes.

    Raises:
        ValueError: it is none of these, or a name cannot be one.
    """
    if isinstance(value, dict):
        named = {str(name): folder for name, folder in value.items()}
    else:
        folders = value if isinstance(value, list) else [value]
        named = {}
        for folder, name in zip(folders, _names(folders, model), strict=True):
            named[name] = folder
    if not named:
        raise ValueError("names no model")
    for name, folder in named.items():
        if folder is not None and (not isinstance(folder, str) or not folder.strip()):
            raise ValueError(f"{name}: {folder!r} is no folder")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} becomes part of names of metrics; letters, digits, and . _ + - only")
    return named


def _names(folders: Iterable[Any], model: str) -> list[str]:
    """A name for each folder: its own, or where that says nothing (`weights`), that of the one above."""
    found: list[str] = []
    for folder in folders:
        path = Path(folder) if isinstance(folder, str) else Path(model)
        silent = path.name == "weights" or path.parent.name == "checkpoints"
        steps = path.name if path.parent.name == "checkpoints" else ""
        owner = (path.parent.parent if steps else path.parent) if silent else path
        name = re.sub(r"[^\w.+-]", "_", "-".join(filter(None, (owner.name, steps)))) or "model"
        number = sum(other == name or other.startswith(f"{name}-") for other in found)
        found.append(f"{name}-{number + 1}" if number else name)
    return found


def model_folder_problems(key: str, folder: str | None, values: dict[str, Any], launch: Path) -> list[str]:
    """What speaks against a named model: no such folder, nothing in it, no tokenizer."""
    if folder is None:
        return []
    named = f"{key}={folder}"
    try:
        found = find_model_folder(absolute(folder, launch), named)
    except UserError as error:
        return [str(error)]
    if found.run is None and found.tokenizer is None and values["model"]["tokenizer"] is None:
        where = "" if os.path.samefile(found.weights, absolute(folder, launch)) else f" ({found.weights})"
        return [f"{named}: holds no tokenizer.model{where}; name the model's own by model.tokenizer=FILE"]
    return []
