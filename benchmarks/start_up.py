"""From the command to its first logged step, beside a bare script that builds and steps the same model.

    python benchmarks/start_up.py [--rounds 5] [--tracking]

Ours is `python -m bc2exp task.steps=1` without evaluation (tiny_7b, embedded text, one process; with
`--tracking` its record in MLflow begins beside it): seconds until the first metrics stand in the journal.
Bare is a Python that imports torch and the model, builds it, and does a forward pass, a backward pass and a
step of AdamW on as many random tokens: seconds until it has the loss. The two take turns; a wrong
configuration is timed, too. Writes every sample and the ratios to results/start_up.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import record  # noqa: E402

BARE = """
import time
import torch
from bc2exp.hardware import get_backend
from bc2exp.model import Baichuan2, init_weights
model = Baichuan2(
    vocab_size=2048, hidden_size=256, intermediate_size=688, num_layers=2, num_heads=8, position="rope",
    ops=get_backend("cpu").ops,
)
init_weights(model, seed=0, std=0.06)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
tokens = torch.randint(0, 2048, (8, 129))
loss = model(tokens[:, :-1], labels=tokens[:, 1:].contiguous())
(loss.sum() / 1024).backward()
optimizer.step()
print(float(loss.sum()), time.time())
"""


def ours(folder: Path, words: list[str]) -> float:
    """Seconds from the start of the command to the first metrics."""
    run = folder / "run"
    begin = time.time()
    command = [sys.executable, "-m", "bc2exp", "task.steps=1", "task.eval_every=null", "task.eval_samples=1"]
    command += ["task.save_every=null", "task.resume=never", f"hydra.run.dir={run}", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = next(line["time"] for line in records if "train/loss" in line.get("metrics", {}))
    shutil.rmtree(run)
    return found - begin


def bare(folder: Path) -> float:
    """Seconds from the start of the script to its loss."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begin = time.time()
    done = subprocess.run([sys.executable, "-c", BARE], env=environment, check=True, capture_output=True)
    return float(done.stdout.split()[1]) - begin


def refused(folder: Path) -> float:
    """Seconds that a wrong configuration takes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begin = time.time()
    command = [sys.executable, "-m", "bc2exp", "task.stepz=1"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 2, done.stderr
    return time.time() - begin


def main() -> None:
    """Measure, and leave the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tracking", action="store_true")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    words = [] if args.tracking else ["tracking.enabled=false"]
    times: dict[str, list[float]] = {"ours": [], "bare": [], "refused": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for _ in range(args.rounds):
            times["ours"].append(ours(folder, words))
            times["bare"].append(bare(folder))
            times["refused"].append(refused(folder))
    case = "tiny_7b, one process"
    entries = [
        record.ratio(case, "seconds to the first step, of a bare script's", times["ours"], times["bare"],
                     better="lower", target=1.3, margin=0.3),
        record.ratio(case, "seconds that a wrong configuration takes", times["refused"], [1.0],
                     better="lower", target=1.5, margin=1.0),
    ]  # fmt: skip
    samples = [{"case": case, "side": side, "values": values} for side, values in times.items()]
    sides = {
        "ours": "python -m bc2exp task.steps=1, without evaluation",
        "bare": "imports torch and the model, builds it, one step",
        "refused": "python -m bc2exp task.stepz=1",
    }
    whole = {"unit": "s", "sides": sides, "samples": samples}
    record.write("start_up", {**whole, "ratios": entries}, args.results)
    print(json.dumps({"seconds": times, "ratios": entries}, indent=1))


if __name__ == "__main__":
    main()
