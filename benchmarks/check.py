"""Today's ratios beside the committed ones.

    python benchmarks/check.py [start_up train_step] [--rounds 1]

Runs the benchmarks anew and prints a line a ratio: committed, today, the worst its margin allows, verdict.
Exit code 1 where one is worse than that, 2 for a name without a committed record. The committed records stay.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import record


def verdicts(committed: dict[str, Any], today: dict[str, Any]) -> list[tuple[str, float, float, float, bool]]:
    """(case and figure, committed, today, the worst allowed, whether it is worse) of every ratio that both
    have."""
    values = {(entry["case"], entry["name"].partition(",")[0]): entry["value"] for entry in today["ratios"]}
    found = []
    for entry in committed["ratios"]:
        name = entry["name"].partition(",")[0]  # what follows is a measured rate
        value = values.get((entry["case"], name))
        if value is None:
            continue
        sign = -1 if entry["better"] == "higher" else 1
        allowed = entry["value"] * (1 + sign * entry["margin"])
        found.append(
            (f"{entry['case']}: {name}", entry["value"], value, allowed, record.is_worse(entry, value))
        )
    return found


def main() -> int:
    """Run, compare, print."""
    known = sorted(file.stem for file in record.RESULTS.glob("*.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in known]
    if unknown:
        print(f"{', '.join(unknown)}: no committed record; there are {', '.join(known)}", file=sys.stderr)
        return 2
    worse = False
    for name in args.names or known:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, str(record.ROOT / "benchmarks" / f"{name}.py")]
            command += ["--rounds", str(args.rounds), "--results", scratch]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found = verdicts(record.read(name), record.read(name, Path(scratch)))
        for what, committed, today, allowed, is_worse in found:
            said = "WORSE" if is_worse else "ok"
            print(
                f"{name}  {what}: committed {committed:.2f}, today {today:.2f}, allowed {allowed:.2f}  {said}"
            )
            worse |= is_worse
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
