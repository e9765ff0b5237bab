"""Environments of the peers: each in a virtual environment of its own, with named packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name(".peer")
TRAINER = ("torch==2.13.0", "transformers>=5.20,<6", "accelerate>=1.15,<2", "deepspeed>=0.19,<0.20")
"""Hugging Face's Trainer, and DeepSpeed through it."""


def interpreter(named: Path | None) -> Path:
    """The Python of the peers: the one that is named, here or in BC2EXP_PEER, or that of an environment which
    is made in benchmarks/.peer where there is none. Raises CalledProcessError where it cannot be made."""
    given = named or os.environ.get("BC2EXP_PEER")
    if given:
        return Path(given).absolute()
    python = FOLDER / "bin" / "python"
    if not python.exists():
        print(f"making an environment for the peers: {', '.join(TRAINER)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        # torch first and exact: a range alone would fetch the newest build with its CUDA libraries
        subprocess.run([str(python), "-m", "pip", "install", "-q", *TRAINER], check=True)
    return python.absolute()
