"""What must hold of a configuration before anything is started: ranges, and facts that span groups.

Every check yields sentences; none raises, so that all mistakes are told at once. Nothing here loads torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bc2exp.config.compare import sides_of
from bc2exp.config.convert import conversion
from bc2exp.config.errors import UserError
from bc2exp.config.evaluate import evaluation_problems
from bc2exp.config.fields import field_of, refusal
from bc2exp.config.finetune import best_of_several
from bc2exp.config.generate import generation_problems
from bc2exp.config.hardware import rehearsal_of
from bc2exp.config.layouts import layout
from bc2exp.config.load import flat
from bc2exp.config.nodes import nodes_add_up
from bc2exp.config.root import GROUPS
from bc2exp.config.roots import absolute, nearest
from bc2exp.config.secrets import ADDRESS, bare, secret_in
from bc2exp.config.supervised import questions_and_answers
from bc2exp.config.sweep import sweep_to_resume
from bc2exp.config.task import TaskConfig
from bc2exp.config.tasks import TASKS
from bc2exp.config.text_files import find_store, find_text_files, needs_column
from bc2exp.config.weight_files import (
    MEGATRON,
    read_config,
    shape_differences,
    shape_of,
    tensor_files,
    weight_kind,
)

TRACKER_SCHEMES = ("http://", "https://", "sqlite:///", "postgresql", "mysql", "mssql", "databricks")


def check(config: DictConfig, folder: Path) -> list[str]:
    """Every sentence that speaks against a composed configuration; relative paths count from `folder`."""
    problems = list(missing_keys(config)) + list(refused_values(config, interpolated=False))
    # What follows needs numbers that make sense on their own; an interpolated one is told where it points.
    problems = problems or list(refused_values(config, interpolated=True))
    if problems:
        return problems
    values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    plain = {str(key): value for key, value in values.items()}
    problems += names(config)
    for relation in (
        model_shape,
        steps_and_schedule,
        best_of_several,
        layout,
        peak,
        rehearsal_of,
        data_files,
        model_files,
        sides_of,
        generation_problems,
        evaluation_problems,
        conversion,
        nodes_add_up,
        tracker,
        no_secrets,
        sweep_to_resume,
    ):
        problems += relation(plain, folder)
    return problems


def layout_problems(config: DictConfig, folder: Path) -> list[str]:
    """The sentences of `check` that are about the layout alone."""
    values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    return layout({str(key): value for key, value in values.items()}, folder)


def missing_keys(config: DictConfig) -> Iterator[str]:
    """Mandatory keys that no YAML and no override gave."""
    for key, _, _, node in leaves(config):
        if node._is_missing():
            yield f"{key}: no value; name one ({key}=...)"


def refused_values(config: DictConfig, *, interpolated: bool) -> Iterator[str]:
    """Values outside the range that their schema declares, and interpolations that come to nothing."""
    for key, parent, name, node in leaves(config):
        if node._is_missing() or node._is_interpolation() != interpolated:
            continue
        try:
            value = parent[name]
            value = list(value) if isinstance(value, ListConfig) else value
        except OmegaConfBaseException as error:
            yield f"{key}={node._value()}: does not resolve: {str(error).splitlines()[0]}"
            continue
        declared = field_of(parent, name)
        reason = refusal(declared, value) if declared is not None else None
        if reason:
            yield f"{key}={value}: {reason}"


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig, str, Node]]:
    """The dotted key, the parent, the name and the node of every value."""
    for name in map(str, node):
        child = node._get_node(name)
        assert isinstance(child, Node)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing()):
            yield from leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", node, name, child


def names(config: DictConfig) -> Iterator[str]:
    """The task's name says which code runs; the others become parts of file names."""
    task = config.task.name
    if TASKS.get(task) is not OmegaConf.get_type(config.task):
        yield f"task.name={task}: names the code that runs and cannot be changed; choose a task with task=..."
    for group in GROUPS:
        name = config[group].name
        if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
            yield f"{group}.name={name}: becomes part of a folder's name; letters, digits, and . _ + - only"


def no_secrets(values: dict[str, Any], folder: Path) -> list[str]:
    """What is configured is recorded, so no value may hold a secret; the tracker's address is made bare."""
    return [
        f"{key}: holds the value of ${name}, a secret, and the configuration is recorded; leave it out"
        for key, value in flat(values).items()
        if key != "tracking.uri" and isinstance(value, str) and (name := secret_in(value)) is not None
    ]


def model_shape(values: dict[str, Any], folder: Path) -> list[str]:
    """Heads divide the width; rotary needs even heads; samples fit the positions."""
    model, dataset = values["model"], values["dataset"]
    problems = []
    hidden, heads = model["hidden_size"], model["num_heads"]
    unit = 2 if model["position"] == "rope" else 1  # rotary positions turn pairs
    if hidden % (heads * unit):
        reason = f"does not divide model.hidden_size={hidden}"
        if hidden % heads == 0:
            reason = f"gives heads of {hidden // heads}, and rotary positions need an even size"
        fitting = [number for number in range(1, hidden + 1) if hidden % (number * unit) == 0]
        near = f"{min(fitting, key=lambda number: abs(number - heads))} would" if fitting else "none does"
        problems.append(f"model.num_heads={heads}: {reason}; {near}")
    if dataset["sequence_length"] > model["max_positions"]:
        problems.append(
            f"dataset.sequence_length={dataset['sequence_length']}: the model was made for "
            f"model.max_positions={model['max_positions']}"
        )
    return problems


def steps_and_schedule(values: dict[str, Any], folder: Path) -> list[str]:
    """Steps or epochs, warmup steps or fraction, and a floor below the top."""
    task = values["task"]
    if "schedule" not in task:
        return []
    problems = []
    if (task["steps"] is None) == (task["epochs"] is None):
        state = "neither is set; set one" if task["steps"] is None else "both are set; set one to null"
        problems.append(f"task.steps, task.epochs: {state}")
    schedule, top = task["schedule"], task["optimizer"]["lr"]
    if schedule["warmup_steps"] is not None and schedule["warmup_fraction"] is not None:
        problems.append(
            "task.schedule.warmup_steps, task.schedule.warmup_fraction: both are set; set one to null"
        )
    if task["steps"] is not None and (schedule["warmup_steps"] or 0) > task["steps"]:
        problems.append(
            f"task.schedule.warmup_steps={schedule['warmup_steps']}: more than task.steps={task['steps']}"
        )
    if schedule["min_lr"] > top:
        problems.append(f"task.schedule.min_lr={schedule['min_lr']:g}: above task.optimizer.lr={top:g}")
    resume = task["resume"]
    if resume not in ("auto", "never") and not os.path.isfile(absolute(resume, folder) / "run.json"):
        problems.append(f"task.resume={resume}: is no run folder (one holds run.json); or auto, or never")
    return problems


def peak(values: dict[str, Any], folder: Path) -> list[str]:
    """A peak comes with its name."""
    problems = []
    peak, name = values["hardware"]["peak_tflops"], values["hardware"]["peak_name"]
    if (peak is None) != (name is None):
        problems.append(
            "hardware.peak_tflops, hardware.peak_name: set both or neither; an MFU is reported with its peak"
        )
    return problems


def data_files(values: dict[str, Any], folder: Path) -> list[str]:
    """The data are named, are there, and are of a kind that can be read."""
    dataset, task = values["dataset"], values["task"]["name"]
    path = dataset["path"]
    problems: list[str] = []
    supervised = TASKS.get(task, TaskConfig).supervised
    if supervised is None:
        supervised = dataset["kind"] != "text"
    if supervised:
        problems += questions_and_answers(dataset, task)
    if len(dataset["split"]) != 3 or not dataset["split"][0]:
        problems.append(
            f"dataset.split={dataset['split']}: three numbers, training, evaluation, test, the first above 0"
        )
    if dataset["source"] != "file":
        for key in ("path", "column"):
            if dataset[key] is not None:
                problems.append(
                    f"dataset.{key}={dataset[key]}: dataset={dataset['name']} reads the text of the package; "
                    "use dataset=text for your own"
                )
        return problems
    if path is None:
        return [
            *problems,
            "dataset.path: no value; name a .parquet, .csv, .jsonl or .txt file, a folder or a pattern of "
            "such, or the .bin of a token store (dataset.path=FILE)",
        ]
    try:
        file = str(absolute(path, folder))
        store = find_store(file, path)
        files = () if store else find_text_files(file, path)
        table = needs_column(files)
    except UserError as error:
        return [*problems, str(error)]
    if store and dataset["append_eos"]:
        problems.append(
            f"dataset.append_eos=True: dataset.path={path} is a token store, whose documents end as they "
            "were made; leave the key out"
        )
    if supervised and store:
        problems.append(f"dataset.path={path}: is a token store; task={task} reads text")
    elif supervised and dataset["kind"] != "text":
        problems += [
            f"dataset.path={path}: {file} has no columns; .csv, .jsonl and .parquet have"
            for file in files
            if file.suffix.lower() == ".txt"
        ][:1]
    elif table and dataset["column"] is None:
        problems.append(
            f"dataset.column: no value; name the column or key of {table.name} that holds the text "
            "(dataset.column=text)"
        )
    return problems


def model_files(values: dict[str, Any], folder: Path) -> list[str]:
    """Tokenizer and weights are there."""
    model, problems = values["model"], []
    if model["tokenizer"] is not None:
        file = absolute(model["tokenizer"], folder)
        if os.path.isdir(file) and not os.path.isfile(file / "tokenizer.model"):
            problems.append(f"model.tokenizer={model['tokenizer']}: this folder holds no tokenizer.model")
        elif not os.path.exists(file):
            problems.append(
                f"model.tokenizer={model['tokenizer']}: no such file{nearest(file)}; Baichuan2's own is the "
                "tokenizer.model of its published folder; without the key the embedded tokenizer serves"
            )
    if model["weights"] is not None:
        weights = absolute(model["weights"], folder)
        if not os.path.isdir(weights):
            problems.append(f"model.weights={model['weights']}: no such folder{nearest(weights)}")
        else:
            problems += [
                f"model.weights={model['weights']}: {text}" for text in refused_weights(weights, model)
            ]
    return problems


def refused_weights(weights: Path, model: dict[str, Any]) -> list[str]:
    """Why a folder is not one of weights of the chosen model, as far as names and small files tell."""
    try:
        kind = weight_kind(weights)
        if kind == MEGATRON:
            return []
        shape = shape_of(read_config(weights))
        tensor_files(weights, kind)
    except ValueError as error:
        return [str(error)]
    differing = shape_differences(shape, model)
    if not differing:
        return []
    return [f"is not of model={model['name']}: {'; '.join(differing)}"]


def tracker(values: dict[str, Any], folder: Path) -> list[str]:
    """The tracking address is of a kind that MLflow has."""
    named, inherited = values["tracking"]["uri"], os.environ.get(ADDRESS)
    uri = named or inherited
    if uri is None or uri.startswith(TRACKER_SCHEMES) or not values["tracking"]["enabled"]:
        return []
    key = "tracking.uri" if named else ADDRESS
    return [
        f"{key}={bare(uri)}: not an address MLflow keeps runs at; sqlite:///mlflow.db or http://host:5000, "
        "or leave it out"
    ]
