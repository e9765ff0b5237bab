"""What a benchmark leaves: its samples as data, the ratios of them, a table and a plot.

    python benchmarks/record.py    makes the tables of benchmarks/README.md and the plots anew from results/

A ratio is of medians and, beside it, of the best samples of both sides. `margin` is the part by which a later
ratio may be worse before `check.py` objects; how far ratios of one machine move from day to day.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "benchmarks" / "README.md"


def machine() -> dict[str, str]:
    """What the samples hang on: processor, memory, system, versions. No names, no paths."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "mlflow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def ratio(
    case: str,
    name: str,
    above: Iterable[float],
    below: Iterable[float],
    *,
    better: str,
    target: float | None = None,
    margin: float = 0.15,
) -> dict[str, Any]:
    """The ratio of two sides' samples, of their medians and of their best; `better` is higher or lower."""
    assert better in ("higher", "lower"), better
    above, below = list(above), list(below)
    return {
        "case": case,
        "name": name,
        "value": statistics.median(above) / statistics.median(below),
        "best": min(above) / min(below),
        "better": better,
        "target": target,
        "margin": margin,
    }


def meets(entry: dict[str, Any]) -> bool | None:
    """Whether a ratio reaches its target; None without one."""
    if entry["target"] is None:
        return None
    if entry["better"] == "higher":
        return bool(entry["value"] >= entry["target"])
    return bool(entry["value"] <= entry["target"])


def allowed(committed: dict[str, Any]) -> float:
    """The worst value that a ratio's margin allows later."""
    sign = -1 if committed["better"] == "higher" else 1
    return float(committed["value"] * (1 + sign * committed["margin"]))


def is_worse(committed: dict[str, Any], today: float) -> bool:
    """Whether today's value is worse than what is `allowed`."""
    higher = committed["better"] == "higher"
    return today < allowed(committed) if higher else today > allowed(committed)


PLACES = ("--results", "--peer", "--folder", "--source", "--tokenizer", "--waimai")
"""Options that name a place on this machine, which is nobody else's."""


def command(name: str, words: list[str]) -> str:
    """The command line of a benchmark with these words, less places."""
    kept, words = [], list(words)
    while words:
        word = words.pop(0)
        if word in PLACES:
            words.pop(0)
        elif not word.startswith(tuple(f"{place}=" for place in PLACES)):
            kept.append(word)
    return shlex.join(["python", f"benchmarks/{name}.py", *kept])


def write(name: str, record: dict[str, Any], results: Path = RESULTS) -> None:
    """Leave a record, with date, machine and the command that is running."""
    results.mkdir(parents=True, exist_ok=True)
    made = {"date": date.today().isoformat(), "machine": machine(), "command": command(name, sys.argv[1:])}
    whole = {"benchmark": name, **made, **record}
    (results / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")


def read(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """A committed record."""
    whole: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return whole


def _shown(value: float) -> str:
    """Two decimals, or of small figures the first digit."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.1g}"


def table(record: dict[str, Any]) -> str:
    """A record's ratios in Markdown, the rows of its `points` if it has them, and where they come from."""
    lines = ["| case | figure | of medians | of the best | target | reached |", "|---|---|---|---|---|---|"]
    for entry in record["ratios"]:
        target = "" if entry["target"] is None else f"{entry['target']:g}"
        reached = {None: "", True: "yes", False: "no"}[meets(entry)]
        figures = f"{_shown(entry['value'])} | {_shown(entry['best'])}"
        lines.append(f"| {entry['case']} | {entry['name']} | {figures} | {target} | {reached} |")
    if "points" in record:
        head, *rows = (f"| {' | '.join(row)} |" for row in record["points"])
        lines += ["", head, "|---" * len(record["points"][0]) + "|", *rows]
    made = record["machine"]
    where = f"{made['processor']}, {made['cores']} cores, {made['memory']}, torch {made['torch']}"
    samples = len(record["samples"])
    return "\n".join([*lines, "", f"{record['date']}, {where}; {samples} series: `{record['command']}`"])


def render(text: str, results: Path = RESULTS) -> str:
    """`text` with the table of every record between its marks, `<!-- table NAME -->` and `<!-- end -->`."""
    for name in sorted(file.stem for file in results.glob("*.json")):
        mark = f"<!-- table {name} -->"
        if mark not in text:
            raise SystemExit(f"benchmarks/README.md has no place for {name}: {mark} and <!-- end -->")
        between = re.compile(re.escape(mark) + r".*?<!-- end -->", re.DOTALL)
        text = between.sub(lambda _, n=name, m=mark: f"{m}\n{table(read(n, results))}\n<!-- end -->", text)
    return text


def plot(record: dict[str, Any], file: Path) -> None:
    """Every sample of a record as a point, a panel a case, a column a side."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(sample["case"] for sample in record["samples"]))
    figure, panels = pyplot.subplots(1, len(cases), figsize=(4 * len(cases), 3.6), squeeze=False)
    for panel, case in zip(panels[0], cases, strict=True):
        mine = [sample for sample in record["samples"] if sample["case"] == case]
        sides = list(dict.fromkeys(sample["side"] for sample in mine))
        for number, side in enumerate(sides):
            values = [value for sample in mine if sample["side"] == side for value in sample["values"]]
            panel.plot([number] * len(values), values, "o", alpha=0.5)
            panel.hlines(statistics.median(values), number - 0.25, number + 0.25, "black")
        panel.set_xticks(range(len(sides)), sides, rotation=25, ha="right", fontsize=8)
        panel.set_xlim(-0.5, len(sides) - 0.5)
        panel.set_ylim(bottom=0)
        panel.set_title(case)
        panel.set_ylabel(record["unit"])
    figure.suptitle(f"{record['benchmark']} (bars: medians)")
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def main() -> None:
    """Make tables and plots anew."""
    README.write_text(render(README.read_text()))
    for file in sorted(RESULTS.glob("*.json")):
        plot(read(file.stem), file.with_suffix(".png"))


if __name__ == "__main__":
    main()
