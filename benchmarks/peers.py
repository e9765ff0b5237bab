"""Runs of a training: ours, and the peers', which have an environment of their own with named packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name(".peer")
PACKAGES = (
    "torch==2.13.0",
    "transformers>=5.20,<6",
    "accelerate>=1.15,<2",
    "deepspeed>=0.19,<0.20",
    "sentencepiece>=0.2,<0.3",
)
"""Hugging Face's Trainer, DeepSpeed through it, and Hugging Face's tokenizer."""


def interpreter(named: Path | None) -> Path:
    """The Python of the peers: the one that is named, here or in BC2EXP_PEER, or that of an environment which
    is made in benchmarks/.peer where there is none. Raises CalledProcessError where it cannot be made."""
    given = named or os.environ.get("BC2EXP_PEER")
    if given:
        return Path(given).absolute()
    python = FOLDER / "bin" / "python"
    if not python.exists():
        print(f"making an environment for the peers: {', '.join(PACKAGES)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        # torch first and exact: a range alone would fetch the newest build with its CUDA libraries
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python.absolute()


def train(python: Path, folder: Path, words: list[str]) -> dict[str, Any]:
    """A run of `peer_trainer.py` on the `rows.npz` and `llama` in `folder`, and what it prints;
    {"reason": why} where it fails."""
    command = [str(python), str(Path(__file__).with_name("peer_trainer.py"))]
    command += ["--rows", str(folder / "rows.npz"), "--weights", str(folder / "llama")]
    command += ["--threads", str(len(os.sched_getaffinity(0))), *words]
    # DeepSpeed asks for MPI unless it is told that it is alone.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    environment = {**os.environ, **(alone if "deepspeed" in " ".join(words) else {})}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"reason": done.stderr.strip().splitlines()[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def ours(words: list[str], run: Path) -> dict[str, Any]:
    """A run of our command in the folder `run`, which is removed, and what its journal says."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bc2exp", *words, f"hydra.run.dir={run}"]
    done = subprocess.run(command, cwd=run.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [each["metrics"] for each in records if "train/loss" in each.get("metrics", {})]
    shutil.rmtree(run)
    return {
        "values": [step["perf/step_time_s"] for step in steps],
        "first_loss": steps[0]["train/loss"],
        "peak_bytes": steps[-1]["mem/peak_gib"] * 2**30,
    }
