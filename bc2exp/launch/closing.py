"""What a person sees at the end of a run: its report, its verdict, and where everything is.

The reports are drawn from the run folder alone. matplotlib takes half a second, which the door need not pay,
so their modules are imported late.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text


def print_report(path: Path, task: str) -> bool:
    """Print what the run in `path` came to, and write its summary; False for a verdict of fail."""
    reports: dict[str, Callable[[Path], bool]] = {
        "compare": _comparison,
        "convert": _conversion,
        "doctor": _doctor,
        "evaluate": _evaluation,
        "generate": _generation,
        "plan": _plan,
        "prepare": _preparation,
        "sweep": _sweep,
    }
    try:
        return reports.get(task, _training)(path)
    except OSError as error:  # the work is done and saved: a report can be made later
        print(f"bc2exp: the report could not be written: {error}", file=sys.stderr)
        return True


def _training(path: Path) -> bool:
    from bc2exp.report.plots import plot_loss
    from bc2exp.report.summary import summarize
    from bc2exp.report.tables import table

    plot_loss(path)
    Console().print(table({path.name: summarize(path)}))
    return True


def _doctor(path: Path) -> bool:
    from bc2exp.report.doctor import summarize_doctor, table, verdict

    report = summarize_doctor(path)
    Console().print(table(report))
    print("\n".join(verdict(report)))
    return all(check["passed"] for check in report["checks"])


def _evaluation(path: Path) -> bool:
    from bc2exp.report.evaluation import summarize_evaluation, tables

    if not (path / "evaluation.json").is_file():
        return True  # it was stopped
    for each in tables(summarize_evaluation(path)):
        Console().print(each, soft_wrap=isinstance(each, Text))
    return True


def _generation(path: Path) -> bool:
    from bc2exp.report.generation import line, summarize_generation

    print(line(summarize_generation(path)))
    return True


def _preparation(path: Path) -> bool:
    from bc2exp.report.preparation import summarize_preparation, tables

    for each in tables(summarize_preparation(path)):
        Console().print(each)
    return True


def _conversion(path: Path) -> bool:
    from bc2exp.report.conversion import summarize_conversion, table

    Console().print(table(summarize_conversion(path)))
    return True


def _plan(path: Path) -> bool:
    from bc2exp.report.plan import summarize_plan, tables, verdict

    plan = summarize_plan(path)
    for each in tables(plan):
        Console().print(each)
    print("\n".join([verdict(plan), *(f"assumed: {text}" for text in plan["assumptions"])]))
    return plan["fits"] is not False


def _comparison(path: Path) -> bool:
    from bc2exp.report.compare.tables import sentences, tables

    report = json.loads((path / "compare.json").read_text("utf-8"))
    for each in tables(report):
        Console().print(each)
    print("\n".join(sentences(report)))
    return bool(report["passed"])


def _sweep(path: Path) -> bool:
    from bc2exp.report.sweep import table

    ranking = json.loads((path / "sweep.json").read_text("utf-8"))
    Console().print(table(ranking))
    return True


def print_places(path: Path, launch_folder: Path, tracking: dict[str, Any], *, resumable: bool) -> None:
    """Say where everything is, how to look at it, and, of an unfinished run, how to go on."""
    if (path / "report.json").is_file():
        store = json.loads((path / "report.json").read_text("utf-8"))["store"]
        print(f"store    {show(Path(store), launch_folder)}.bin and .idx")
    if (path / "answers.jsonl").is_file():
        print(f"answers  {show(path / 'answers.jsonl', launch_folder)}")
    if (path / "predictions.csv").is_file():
        print(f"rows     {show(path / 'predictions.csv', launch_folder)}")
    if (path / "conversion.json").is_file():
        target = json.loads((path / "conversion.json").read_text("utf-8"))["target"]
        print(f"weights  {show(Path(target), launch_folder)}")
    if (path / "plan.json").is_file():
        print(f"plan     {show(path / 'plan.json', launch_folder)}")
    if (path / "doctor.json").is_file():
        print(f"checks   {show(path / 'doctor.json', launch_folder)}")
    if (path / "weights").is_dir():
        print(f"weights  {show(path / 'weights', launch_folder)} (safetensors, Hugging Face layout)")
    if (path / "compare.html").is_file():
        print(f"page     {show(path / 'compare.html', launch_folder)} (open it in a browser)")
    plots = ("loss.png", "lengths.png", "confusion.png", "loss_overlay.png", "loss_error.png", "sweep.png")
    for plot in plots:
        if (path / plot).is_file():
            print(f"plot     {show(path / plot, launch_folder)}")
    checkpoints = sorted((path / "checkpoints").glob("step-*"))
    if resumable and checkpoints:
        print(f"resume   the same command again goes on from {show(checkpoints[-1], launch_folder)}")
    if tracking["enabled"]:
        print(f"mlflow   {_look(path, tracking['uri'])}")


def _look(path: Path, uri: str) -> str:
    """How to look at the run in MLflow: the page of a server, or the command that opens a database."""
    if not uri.startswith(("http://", "https://")):
        return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
    try:
        found = json.loads((path / "tracking.json").read_text("utf-8"))
    except FileNotFoundError:  # it was away
        return uri
    return f"{uri.rstrip('/')}/#/experiments/{found['experiment_id']}/runs/{found['run_id']}"


def show(path: Path, launch_folder: Path) -> str:
    """A path as a person types it: relative to the launch folder where it lies below."""
    return str(path.relative_to(launch_folder)) if path.is_relative_to(launch_folder) else str(path)
