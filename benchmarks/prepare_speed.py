"""Speed and memory of `bc2exp.data.prepare` beside raw SentencePiece, on the same text and tokenizer.

    python benchmarks/prepare_speed.py --source FILE --column text --tokenizer FILE [--workers 2] [--rounds 3]
                                       [--times 10]

Raw is `SentencePieceProcessor.encode(texts, num_threads=WORKERS)` of all texts at once, read before. Every
measurement is a fresh process; the two sides take turns, and the medians count. Tokens a second, four ways:

    steady    ours: from the first batch that is written to the last; raw: the call of encode
    call      ours: all of prepare(): looking at the files, starting workers, reading, encoding, writing
              and bringing the store to the disk; raw: reading the texts, loading the model and encode
    process   the same with the start of Python and all imports, and its end
    cpu       call, by the processor seconds of all threads and processes instead of the clock, times
              WORKERS: what remains to compare on a machine that is busy with other things

Memory: the high-water marks (VmHWM) of the process and its workers added, on the source once and `--times` as
often (parquet only: all rows in one row group, which is the hardest case). Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def peak_bytes(pid: str = "self") -> int:
    """High-water mark of a process (not ru_maxrss, which starts with that of the process before it)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run_ours(args: argparse.Namespace) -> None:
    """Prepare once, into a new folder, and print what it took."""
    from bc2exp.data.building import Progress
    from bc2exp.data.prepare import prepare
    from bc2exp.data.sources import find_source
    from bc2exp.text.tokenizer import Tokenizer

    written: list[tuple[float, int]] = []
    workers: dict[str, int] = {}

    def tell(progress: Progress) -> None:
        if progress.stage == "encode":
            written.append((time.perf_counter(), progress.tokens))
            if args.measure == "memory":
                children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
                workers.update({pid: peak_bytes(pid) for pid in children.split()})

    with tempfile.TemporaryDirectory() as cache:
        begin, cpu = time.perf_counter(), cpu_seconds()
        source = find_source("file", args.source, args.column)
        options = {"name": "speed", "workers": args.workers, "progress": tell}
        report = prepare(source, Tokenizer(Path(args.tokenizer)), Path(cache), **options).report
        seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    # the last call tells the end of the files, after the last batch of tokens
    last = next(index for index, entry in enumerate(written) if entry[1] == report["tokens"])
    (first_time, first_tokens), (last_time, last_tokens) = written[0], written[last]
    found = {
        "tokens": report["tokens"],
        "text_bytes": report["text_bytes"],
        "steady": (last_tokens - first_tokens) / (last_time - first_time),
        "call": report["tokens"] / seconds,
        "cpu": report["tokens"] / cpu * args.workers,
        "peak_bytes": peak_bytes(),
        "workers_peak_bytes": list(workers.values()),
    }
    print(json.dumps(found))


def run_raw(args: argparse.Namespace) -> None:
    """Encode once with nothing but SentencePiece, and print what it took."""
    import sentencepiece

    from bc2exp.data.rows import Row
    from bc2exp.data.sources import find_source, read_rows

    begin, cpu = time.perf_counter(), cpu_seconds()
    rows = read_rows(find_source("file", args.source, args.column))
    texts = [row.text for row in rows if isinstance(row, Row) and row.text]
    processor = sentencepiece.SentencePieceProcessor(model_file=args.tokenizer)
    middle = time.perf_counter()
    tokens = sum(map(len, processor.encode(texts, num_threads=args.workers)))
    end, cpu = time.perf_counter(), cpu_seconds() - cpu
    rates = {
        "steady": tokens / (end - middle),
        "call": tokens / (end - begin),
        "cpu": tokens / cpu * args.workers,
    }
    print(json.dumps({"tokens": tokens, **rates}))


def run(side: str, measure: str, args: argparse.Namespace, source: str) -> dict:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--measure", measure, "--source", source]
    command += ["--tokenizer", args.tokenizer, "--workers", str(args.workers)]
    command += ["--column", args.column] if args.column else []
    begin = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - begin
    found = json.loads(done.stdout)
    return {"side": side, **found, "process": found["tokens"] / seconds}


def measure_speed(args: argparse.Namespace) -> None:
    """Both sides in turn, and the ratio of their medians."""
    found: dict[str, list[dict]] = {"raw": [], "ours": []}
    for number in range(args.rounds):
        for side, results in found.items():
            results.append(run(side, "speed", args, args.source))
            print(json.dumps({"round": number, **results[-1]}), flush=True)
    rates = ("steady", "call", "process", "cpu")
    medians = {
        side: {rate: statistics.median(result[rate] for result in results) for rate in rates}
        for side, results in found.items()
    }
    ratios = {rate: round(medians["ours"][rate] / medians["raw"][rate], 4) for rate in rates}
    print(json.dumps({"tokens_per_s": medians, "ours_to_raw": ratios}), flush=True)


def measure_memory(args: argparse.Namespace) -> None:
    """Peak of the source once and many times, and their ratio."""
    import pyarrow as pa
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(args.source, columns=[args.column])
    sums = []
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, args.times):
            many = pa.concat_tables([table] * times)
            path = f"{folder}/{times}.parquet"
            pyarrow.parquet.write_table(many, path, row_group_size=len(many))
            found = run("ours", "memory", args, path)
            sums.append(found["peak_bytes"] + sum(found["workers_peak_bytes"]))
            print(json.dumps({"times": times, **found}), flush=True)
    print(json.dumps({"times": args.times, "peak_ratio": round(sums[1] / sums[0], 4)}))


def main() -> None:
    """Measure speed, then memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--column")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=10, help="0: no memory is measured")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        (run_ours if args.side == "ours" else run_raw)(args)
        return
    measure_speed(args)
    if args.times:
        measure_memory(args)


if __name__ == "__main__":
    main()
