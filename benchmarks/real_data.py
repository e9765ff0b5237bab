"""The real data that some benchmarks read and the project does not ship."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALPACA = "train-00000-of-00001-a09b74b3ef9c3b56.parquet"
WAIMAI = "waimai_10k.csv"
TOKENIZER = "tokenizer/baichuan2_tokenizer.model"


def find(named: Path | None, relative: str, option: str) -> Path:
    """The file that `option` named, else `relative` in BC2EXP_SHARED_DATA or ../shared/data; ends with exit
    code 2 where there is none."""
    folder = Path(os.environ.get("BC2EXP_SHARED_DATA", ROOT.parent / "shared" / "data"))
    path = named or folder / relative
    if not path.is_file():
        advice = f"name it with {option}, or its folder of real data in BC2EXP_SHARED_DATA"
        print(f"{path}: there is no such file; {advice}", file=sys.stderr)
        raise SystemExit(2)
    return path
