"""What must hold of a configuration before anything is started: ranges, and facts that span groups.

Every check yields sentences; none raises, so that all mistakes are told at once. Nothing here loads torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, OmegaConf

from bc2exp.config.fields import describe_bounds, field_of, within

TRACKER_SCHEMES = ("http://", "https://", "sqlite:///", "postgresql", "mysql", "mssql", "databricks")
TEXT_SUFFIXES = (".parquet", ".csv", ".txt")


def check(config: DictConfig, folder: Path) -> list[str]:
    """Every sentence that speaks against a composed configuration; relative paths count from `folder`."""
    problems = list(missing_keys(config)) + list(out_of_range(config))
    if problems:  # the relations below need numbers that make sense on their own
        return problems
    try:
        values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    except Exception as error:
        return [f"the configuration does not resolve: {str(error).splitlines()[0]}"]
    assert isinstance(values, dict)
    for relation in (model_shape, steps_and_schedule, layout, data_files, model_files, tracker):
        problems += relation(values, folder)
    return problems


def missing_keys(config: DictConfig) -> Iterator[str]:
    """Mandatory keys that no YAML and no override gave."""
    for key in sorted(OmegaConf.missing_keys(config)):
        yield f"{key}: no value; name one ({key}=...)"


def out_of_range(node: Container, prefix: str = "") -> Iterator[str]:
    """Values outside the range that their schema declares. Interpolations are told where they point."""
    if not isinstance(node, DictConfig):
        return
    for name in node:
        key = f"{prefix}{name}"
        child = node._get_node(name)
        if child is None or child._is_interpolation() or child._is_missing() or child._is_none():  # type: ignore[union-attr]
            continue
        if isinstance(child, DictConfig):
            yield from out_of_range(child, key + ".")
            continue
        declared = field_of(node, str(name))
        if declared is None:
            continue
        value = node[name]
        bounds, choices = declared.metadata["bounds"], declared.metadata["choices"]
        elements = list(value) if isinstance(value, ListConfig) else [value]
        for element in elements:
            if isinstance(element, (int, float)) and not isinstance(element, bool):
                if not within(element, bounds):
                    yield f"{key}={element}: must be {describe_bounds(bounds) or 'a finite number'}"
            elif choices and element not in choices:
                yield f"{key}={element}: must be one of {', '.join(choices)}"
        if isinstance(value, str) and not value.strip():
            yield f"{key}: is empty; " + ("leave it out or write null" if child._is_optional() else "name a value")


def model_shape(values: dict[str, Any], folder: Path) -> list[str]:
    """Heads divide the width; rotary needs even heads; samples fit the positions."""
    model, dataset = values["model"], values["dataset"]
    problems = []
    hidden, heads = model["hidden_size"], model["num_heads"]
    if hidden % heads:
        near = min((n for n in range(1, hidden + 1) if hidden % n == 0), key=lambda n: abs(n - heads))
        problems.append(f"model.num_heads={heads}: does not divide model.hidden_size={hidden}; {near} would")
    elif model["position"] == "rope" and (hidden // heads) % 2:
        problems.append(
            f"model.num_heads={heads}: gives heads of {hidden // heads}, and rotary positions need an even size"
        )
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
        state = "neither is set" if task["steps"] is None else "both are set"
        problems.append(f"task.steps, task.epochs: {state}; set one and leave the other null (task.steps=null)")
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
    if resume not in ("auto", "never") and not (_absolute(resume, folder) / "run.json").is_file():
        problems.append(f"task.resume={resume}: no run folder there (it would hold run.json); or auto, or never")
    return problems


def layout(values: dict[str, Any], folder: Path) -> list[str]:
    """The degrees cover the devices; the batch divides over the ranks."""
    devices, replicate = values["hardware"]["num_devices"], values["parallelism"]["replicate"]
    problems = []
    if replicate == 0 or (replicate != -1 and replicate != devices):
        problems.append(
            f"parallelism.replicate={replicate}: hardware.num_devices={devices} needs {devices} (or -1); "
            f"nearest choice: parallelism={'single' if devices == 1 else 'ddp'}"
        )
    task = values["task"]
    if not problems and "global_batch" in task:
        batch, micro = task["global_batch"], task["micro_batch"]
        unit = devices * (micro or 1)
        if batch % unit:
            near = max(unit, round(batch / unit) * unit)
            per_rank = f" x task.micro_batch={micro}" if micro else ""
            problems.append(
                f"task.global_batch={batch}: not a multiple of {devices} data-parallel "
                f"rank{'s' * (devices > 1)}{per_rank} = {unit}; {near} would be"
            )
    peak, name = values["hardware"]["peak_tflops"], values["hardware"]["peak_name"]
    if (peak is None) != (name is None):
        problems.append(
            "hardware.peak_tflops, hardware.peak_name: set both or neither; an MFU is reported with its peak"
        )
    return problems


def data_files(values: dict[str, Any], folder: Path) -> list[str]:
    """The data file is named, is there, and is of a kind that can be read."""
    dataset = values["dataset"]
    path, problems = dataset["path"], []
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
        return [*problems, "dataset.path: no value; name a .parquet, .csv or .txt file (dataset.path=FILE)"]
    file = _absolute(path, folder)
    if not file.exists():
        problems.append(f"dataset.path={path}: no such file{_like(file)}")
    elif not file.is_file():
        problems.append(f"dataset.path={path}: is a folder; name one file in it")
    elif file.suffix.lower() not in TEXT_SUFFIXES:
        problems.append(f"dataset.path={path}: cannot be read; {', '.join(TEXT_SUFFIXES)} can")
    elif file.suffix.lower() != ".txt" and dataset["column"] is None:
        problems.append("dataset.column: no value; name the column that holds the text (dataset.column=text)")
    elif not os.access(file, os.R_OK):
        problems.append(f"dataset.path={path}: may not be read (permissions)")
    return problems


def model_files(values: dict[str, Any], folder: Path) -> list[str]:
    """Tokenizer and weights are there."""
    model, problems = values["model"], []
    if model["tokenizer"] is not None:
        file = _absolute(model["tokenizer"], folder)
        if file.is_dir() and not (file / "tokenizer.model").is_file():
            problems.append(f"model.tokenizer={model['tokenizer']}: this folder holds no tokenizer.model")
        elif not file.exists():
            problems.append(
                f"model.tokenizer={model['tokenizer']}: no such file{_like(file)}; Baichuan2's own is the file "
                "tokenizer.model of its published model folder; without the key the embedded tokenizer serves"
            )
    if model["weights"] is not None:
        weights = _absolute(model["weights"], folder)
        if not weights.is_dir():
            problems.append(f"model.weights={model['weights']}: no such folder{_like(weights)}")
        elif not any(weights.glob("*.safetensors")):
            problems.append(
                f"model.weights={model['weights']}: holds no .safetensors; pickled .bin files are not read, "
                "convert them to safetensors first"
            )
    return problems


def tracker(values: dict[str, Any], folder: Path) -> list[str]:
    """The tracking address is of a kind that MLflow has."""
    uri = values["tracking"]["uri"]
    if uri is None or uri.startswith(TRACKER_SCHEMES):
        return []
    return [
        f"tracking.uri={uri}: not an address MLflow keeps runs at; sqlite:///mlflow.db or http://host:5000, "
        "or leave it out"
    ]


def _absolute(path: str, folder: Path) -> Path:
    return folder / Path(path).expanduser()


def _like(path: Path) -> str:
    """`; nearest: x` with the file of the same folder whose name is most alike, where there is one."""
    import difflib

    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; nearest: {path.parent / near[0]}" if near else ""
