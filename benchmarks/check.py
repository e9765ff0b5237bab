"""Today's ratios beside the committed ones.

    python benchmarks/check.py [start_up train_step] [--rounds 1]

Runs the benchmarks anew, each with the words of its record, and prints a line a ratio: committed, today, the
worst its margin allows, verdict. Where the processor is another one, a line says so first: margins are how
far ratios of one machine move. Exit code 1 where one is worse than that or a benchmark fails, 2 for a name
without a committed record. The committed records stay.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import record


class Verdict(NamedTuple):
    """On one ratio: case and figure, committed, today (None: not measured), the worst allowed."""

    what: str
    committed: float
    today: float | None
    allowed: float
    is_worse: bool

    def __str__(self) -> str:
        if self.today is None:
            return f"{self.what}: committed {self.committed:.3g}, not measured today"
        said = "WORSE" if self.is_worse else "ok"
        return (
            f"{self.what}: committed {self.committed:.3g}, today {self.today:.3g}, "
            f"allowed {self.allowed:.3g}  {said}"
        )


def verdicts(committed: dict[str, Any], today: dict[str, Any]) -> list[Verdict]:
    """One on every committed ratio."""
    values = {(entry["case"], entry["name"].partition(",")[0]): entry["value"] for entry in today["ratios"]}
    found = []
    for entry in committed["ratios"]:
        name = entry["name"].partition(",")[0]  # what follows is a measured rate
        value = values.get((entry["case"], name))
        is_worse = value is not None and record.is_worse(entry, value)
        what = f"{entry['case']}: {name}"
        found.append(Verdict(what, entry["value"], value, record.allowed(entry), is_worse))
    return found


def other_processor(committed: dict[str, Any], today: dict[str, Any]) -> str | None:
    """Which one a record was made on, and which one today's, where they differ."""
    then, now = (made["machine"]["processor"] for made in (committed, today))
    return None if then == now else f"made on {then}, today's on {now}"


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
        then = record.read(name, record.RESULTS)
        with tempfile.TemporaryDirectory() as scratch:
            words = [*shlex.split(then["command"])[2:], "--rounds", str(args.rounds), "--results", scratch]
            command = [sys.executable, str(record.ROOT / "benchmarks" / f"{name}.py"), *words]
            code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
            if code != 0:
                print(f"{name}  FAILED with code {code}: {shlex.join(command)}", flush=True)
                worse = True
                continue
            now = record.read(name, Path(scratch))
        moved = other_processor(then, now)
        if moved is not None:
            print(f"{name}  {moved}", flush=True)
        for verdict in verdicts(then, now):
            print(f"{name}  {verdict}", flush=True)
            worse |= verdict.is_worse
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
