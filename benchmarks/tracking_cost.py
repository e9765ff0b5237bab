"""What recording every step in MLflow costs a training of short steps.

    python benchmarks/tracking_cost.py [--rounds 2] [--blocks 12]

One training in one process, in blocks of STEPS steps, which record and do not in turn, so that what else the
machine does strikes both alike:

    every step  each step is written to the journal, and the process beside the run replays it into sqlite
    none        nothing is written, and that process is stopped

A round is a fresh run of so many blocks of each kind. Writes the seconds a step of every block and the ratio,
the median over neighbours with its 95 % interval, to results/tracking_cost.json; beside it the part of all
cores' time that the process beside the run took, which moves less than the clock does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import given  # noqa: E402
import packing_speed  # noqa: E402
import record  # noqa: E402

STEPS = 96
"""Steps of a block: over four seconds at 20 a second; the follower pauses 0.5 to 10."""
WARM = 1
CASE = "tiny_7b, sqlite"
BESIDE = "the process beside the run"


def measure(folder: Path, blocks: int) -> dict[str, list[float]]:
    """Seconds a step of the blocks of a run in `folder`."""
    from bc2exp.hardware import get_backend
    from bc2exp.launch.tracker import Tracker
    from bc2exp.parallel.world import World
    from bc2exp.tasks.finetune import make_trainer
    from bc2exp.text.tokenizer import Tokenizer, find_tokenizer
    from bc2exp.tracking.journal import Journal, NullJournal

    run, steps = folder / "run", 2 * blocks * STEPS
    words = ["task=finetune", "model=tiny_7b", "task.global_batch=24", "task.micro_batch=24"]
    words += ["task.epochs=null", "task.eval_every=null", "task.eval_samples=1", "task.save_every=null"]
    words += [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"hydra.run.dir={run}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bc2exp", *words, "task.steps=1"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    config = given.configuration([*words, f"task.steps={steps + 1}"], folder)
    world = World(0, 1, 0, 1, get_backend("cpu"))
    world.join()
    silent = NullJournal()
    tokenizer = Tokenizer(find_tokenizer(config.model.tokenizer, None))
    trainer, start = make_trainer(config, folder, world, silent, tokenizer)
    trainer.checkpoints, trainer.evaluation = packing_speed.NoCheckpoints(), []  # type: ignore[assignment]
    journal, tracker = Journal(run / "metrics.jsonl", 2), Tracker(run, 60)
    sides = {"every step": (journal, 1, signal.SIGCONT), "none": (silent, steps, signal.SIGSTOP)}
    found: dict[str, list[float]] = {side: [] for side in (*sides, BESIDE)}
    for _ in range(blocks):
        for side, (trainer.journal, trainer.log_every, what) in sides.items():
            tracker._process.send_signal(what)
            trainer.steps = start + STEPS
            begin, before = time.perf_counter(), processor_seconds(tracker._process.pid)
            trainer.run(start)
            found[side].append((time.perf_counter() - begin) / STEPS)
            if side != "none":
                found[BESIDE].append((processor_seconds(tracker._process.pid) - before) / STEPS)
            start += STEPS
    tracker._process.send_signal(signal.SIGCONT)
    said = tracker.close(lambda: False)
    assert said is None, said
    journal.close()
    world.leave()
    return {side: values[WARM:] for side, values in found.items()}


def processor_seconds(pid: int) -> float:
    """What a process has taken of all processors."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def interval(pairs: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(2000))
    return medians[50], medians[-51]


def main() -> None:
    """Measure, and leave the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    samples = []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            for side, values in measure(Path(scratch), args.blocks).items():
                samples.append({"case": CASE, "side": side, "round": number, "values": values})
    recorded, silent, beside = (
        [value for sample in samples if sample["side"] == side for value in sample["values"]]
        for side in ("every step", "none", BESIDE)
    )
    pairs = [above / below for above, below in zip(recorded, silent, strict=True)]
    low, high = interval(pairs)
    name = f"a step's time against none, neighbours' median (95 %: {low:.3f} to {high:.3f})"
    rate = 1 / statistics.median(silent)
    # Of the sums: it pauses for longer than some blocks.
    part = sum(beside) / sum(recorded) / len(os.sched_getaffinity(0))
    entries = [
        {**record.ratio(CASE, name, recorded, silent, better="lower", target=1.01, margin=0.05),
         "value": statistics.median(pairs)},
        {**record.ratio(CASE, "part of all cores' time that the process beside the run takes", beside,
                        recorded, better="lower", margin=1.0),
         "value": part, "best": part},
    ]  # fmt: skip
    sides = {"every step": "journal and MLflow, log_every=1", "none": "no journal, the follower stopped"}
    sides |= {BESIDE: "its processor time in the blocks of every step"}
    whole = {"unit": "s a step", "sides": sides}
    whole |= {"steps_per_s": round(rate, 1), "samples": samples, "ratios": entries}
    record.write("tracking_cost", whole, args.results)
    print(json.dumps({"steps_per_s": rate, "ratios": entries}, indent=1))


if __name__ == "__main__":
    main()
