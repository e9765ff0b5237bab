"""Whether speed holds while the work grows: over sequence length, batch, ranks and rows of text.

    python benchmarks/growth.py [--axis sequence batch ranks rows] [--rounds 3] [--steps 8] [--points N]
                                [--source FILE] [--tokenizer FILE]

Every point is a run of the real command, and the points take turns:

    sequence   `python -m bc2exp task=pretrain` of a small model, one sample a step of 512 to 8,192 tokens
    batch      1 to 32 samples of 512 tokens a step
    ranks      1 to 8 processes over gloo, two samples of 512 tokens each; they share the cores of this
               machine, so beyond as many as there are no more tokens a second can be had
    rows       `python -m bc2exp task=prepare` of 10,000 to 1,000,000 rows: Alpaca's, over and over

The speed is in tokens a second, of all ranks together: of a step from the journal (the first WARM do not
count), of preparing from its report. Two figures an axis: the exponent of the time over the work, 1 where
tokens a second stay the same, and the worst point against the trend, which is the line through its two
neighbours where both scales are logarithmic: a cliff is a point far below. Alpaca and Baichuan2's tokenizer
are looked for in BC2EXP_SHARED_DATA and ../shared/data. Writes results/growth.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import real_data  # noqa: E402
import record  # noqa: E402

AXES = {
    "sequence": (512, 1024, 2048, 4096, 8192),
    "batch": (1, 2, 4, 8, 16, 32),
    "ranks": (1, 2, 4, 8),
    "rows": (10_000, 30_000, 100_000, 300_000, 1_000_000),
}
SEQUENCE = 512
SAMPLES_A_RANK = 2
SHAPE = {"hidden_size": 128, "intermediate_size": 344, "num_layers": 2, "num_heads": 4, "max_positions": 8192}
VOCABULARY = 2048
"""Of the embedded tokenizer."""
WARM = 2


def slope(rates: dict[int, float]) -> float:
    """The exponent of the time over the work, from {work: rate}: the fitted line's slope, of logarithms."""
    works = [math.log(work) for work in rates]
    times = [math.log(work / rate) for work, rate in rates.items()]
    return statistics.linear_regression(works, times).slope


def expected(work: int, left: tuple[int, float], right: tuple[int, float]) -> float:
    """The rate at `work` on the line through two points (work, rate), where both scales are logarithmic."""
    part = math.log(work / left[0]) / math.log(right[0] / left[0])
    return left[1] ** (1 - part) * right[1] ** part


def worst(rates: dict[int, float]) -> tuple[int, float]:
    """(work, part of the rate expected from its neighbours) of the inner point that has the least of it."""
    points = list(rates.items())
    found = [
        (rate / expected(work, left, right), work)
        for left, (work, rate), right in zip(points, points[1:], points[2:], strict=False)
    ]
    part, work = min(found)
    return work, part


def make_store(folder: Path, steps: int) -> None:
    """Random tokens, enough for every point's steps."""
    import numpy as np

    from bc2exp.data.store_writer import StoreWriter

    length = AXES["sequence"][-1] * steps
    generator = np.random.default_rng(0)
    with StoreWriter(folder / "store") as writer:
        for _ in range(20):
            tokens = generator.integers(0, VOCABULARY, length, dtype=np.int32)
            writer.add(array("i", [length]), array("i", tokens.tobytes()))
        writer.finish()


def make_rows(folder: Path, source: Path, sizes: tuple[int, ...]) -> None:
    """The source's rows over and over, a file for each size."""
    import pyarrow as pa
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(source, columns=["text"])
    for size in sizes:
        many = pa.concat_tables([table] * math.ceil(size / len(table))).slice(0, size)
        pyarrow.parquet.write_table(many, folder / f"{size}.parquet", row_group_size=10_000)


def command(folder: Path, words: list[str]) -> Path:
    """Our command; returns its run folder."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    whole = [sys.executable, "-m", "bc2exp", "tracking.enabled=false", f"hydra.run.dir={run}", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return run


def train(folder: Path, steps: int, *, sequence: int, samples: int, ranks: int) -> list[float]:
    """Tokens a second of every step of a training that counts."""
    words = [f"model.{name}={value}" for name, value in SHAPE.items()]
    words += ["task=pretrain", "model=tiny_7b", "hardware=cpu", "parallelism=ddp"]
    words += [f"hardware.num_devices={ranks}", "dataset=text", f"dataset.path={folder / 'store.bin'}"]
    words += [f"dataset.sequence_length={sequence}", f"task.global_batch={samples}"]
    words += [f"task.micro_batch={samples // ranks}", f"task.steps={steps}", "task.eval_every=null"]
    words += ["task.eval_samples=1", "task.save_every=null", "task.resume=never"]
    run = command(folder, words)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [each["metrics"] for each in records if "train/loss" in each.get("metrics", {})]
    return [sequence * samples / step["perf/step_time_s"] for step in metrics[WARM:]]


def prepare(folder: Path, rows: int, tokenizer: Path) -> list[float]:
    """Tokens a second of preparing that many rows."""
    words = ["task=prepare", "dataset=text", f"dataset.path={folder / f'{rows}.parquet'}"]
    words += ["dataset.column=text", f"dataset.cache={folder / 'cache'}", f"model.tokenizer={tokenizer}"]
    report = json.loads((command(folder, words) / "report.json").read_text())
    shutil.rmtree(folder / "cache")
    return [report["tokens"] / report["seconds"]]


def measure(axis: str, work: int, folder: Path, args: argparse.Namespace) -> list[float]:
    """Tokens a second of one point."""
    if axis == "rows":
        return prepare(folder, work, args.tokenizer)
    if axis == "sequence":
        return train(folder, args.steps, sequence=work, samples=1, ranks=1)
    if axis == "batch":
        return train(folder, args.steps, sequence=SEQUENCE, samples=work, ranks=1)
    return train(folder, args.steps, sequence=SEQUENCE, samples=SAMPLES_A_RANK * work, ranks=work)


def ratios(rates: dict[str, dict[int, list[float]]]) -> list[dict[str, Any]]:
    """Exponent and worst point of every axis, from {axis: {work: rates}}."""
    found = []
    for axis, points in rates.items():
        medians = {work: statistics.median(values) for work, values in points.items()}
        best = {work: max(values) for work, values in points.items()}
        exponent = record.ratio(axis, "exponent of the time", [slope(medians)], [1.0], better="lower")
        work, part = worst(medians)
        name = f"worst point of what its neighbours make expect, at {work:,}"
        least = record.ratio(axis, name, [part], [1.0], better="higher", target=0.8)
        found += [{**exponent, "best": slope(best)}, {**least, "best": worst(best)[1]}]
    return found


def points(rates: dict[str, dict[int, list[float]]]) -> list[list[str]]:
    """The rows of a table of all points, each beside the first of its axis."""
    found = [["axis", "point", "tokens/s, of the first point's"]]
    for axis, values in rates.items():
        medians = {work: statistics.median(each) for work, each in values.items()}
        first = next(iter(medians.values()))
        found += [[axis, f"{work:,}", f"{rate / first:.2f}"] for work, rate in medians.items()]
    return found


def main() -> None:
    """Run every point in turn, and leave the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--points", type=int, help="the first of each axis, 3 or more; all by default")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    axes = {axis: AXES[axis][: args.points] for axis in args.axis}
    rates: dict[str, dict[int, list[float]]] = {axis: {work: [] for work in axes[axis]} for axis in axes}
    samples: list[dict[str, Any]] = []
    if "rows" in axes:
        args.source = real_data.find(args.source, real_data.ALPACA, "--source")
        args.tokenizer = real_data.find(args.tokenizer, real_data.TOKENIZER, "--tokenizer").absolute()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_store(folder, args.steps)
        if "rows" in axes:
            make_rows(folder, args.source, axes["rows"])
        for number in range(args.rounds):
            for axis, works in axes.items():
                for work in works:
                    values = measure(axis, work, folder, args)
                    rates[axis][work] += values
                    sample = {"case": axis, "side": f"{work:,}", "round": number, "values": values}
                    samples.append(sample)
                    print(json.dumps(sample), flush=True)
    entries = ratios(rates)
    sides = {
        "sequence": "tokens of the one sample of a step",
        "batch": f"samples of {SEQUENCE} tokens a step",
        "ranks": f"processes, {SAMPLES_A_RANK} samples of {SEQUENCE} tokens each",
        "rows": "rows prepared",
    }
    whole = {"unit": "tokens/s", "sides": sides}
    whole |= {"samples": samples, "ratios": entries, "points": points(rates)}
    record.write("growth", whole, args.results)
    print(json.dumps(entries, indent=1))


if __name__ == "__main__":
    main()
