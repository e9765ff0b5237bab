"""From a file of text to a token store, beside raw SentencePiece and beside Megatron-LM's way.

    python benchmarks/prepare.py [--source FILE] [--column text] [--tokenizer FILE] [--workers CORES]
                                 [--rounds 3] [--times 10] [--peer PYTHON]

Without names it is Alpaca's text and Baichuan2's tokenizer, in BC2EXP_SHARED_DATA or ../shared/data. All
sides encode with the same model of SentencePiece. Nothing is added before or after a text, and that the sides
have as many tokens is asserted.

    ours           `bc2exp.data.prepare`: fingerprints of the files, checks of each row, a checksum, and the
                   store is brought to the disk
    raw            `SentencePieceProcessor.encode(texts, num_threads=WORKERS)` of all texts at once
    megatron way   `megatron_way.py`: what Megatron-LM's preprocess_data does with the texts as JSON lines, in
                   a pool, document by document; with plain SentencePiece, so that only the way is compared
    hugging face   the same with SentencePiece in the class that transformers has for it, in the environment
                   of the peers (`--peer`, else BC2EXP_PEER, else one is made in benchmarks/.peer)

Every measurement is a fresh process; the sides take turns. Seconds a million tokens, four ways:

    steady    from the first batch (Megatron's: document) that is written to the last; raw: the call of encode
    call      ours: all of prepare(); raw: reading the texts, loading the model and encode; Megatron's: from
              starting the pool until the store is written
    process   the same with the start of Python and all imports, and its end
    cpu       the processor seconds of all threads and processes instead of the clock, divided by WORKERS:
              what remains to compare on a machine that is busy with other things

Memory: the high-water marks (VmHWM) of our process and its workers added, in MiB, on the source once and
`--times` as often (parquet only: all rows in one row group, which is the hardest case). Writes every sample
and the ratios to results/prepare.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import peers  # noqa: E402
import real_data  # noqa: E402
import record  # noqa: E402
from megatron_way import CHUNK, cpu_seconds  # noqa: E402

WAYS = ("steady", "call", "process", "cpu")
TARGETS = {
    ("raw", "call"): 0.9,
    ("raw", "cpu"): 0.9,
    ("megatron way", "call"): 3.0,
    ("hugging face", "call"): 3.0,
}
"""Wanted: our tokens a second over theirs."""
MEGATRON = {"megatron way": "sentencepiece", "hugging face": "hugging face"}
"""The tokenizer of `megatron_way.py` for each side that is it."""


def peak_bytes(pid: str = "self") -> int:
    """High-water mark of a process (not ru_maxrss, which starts with that of the process before it)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


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
        source = find_source("file", str(args.source), args.column)
        options = {"name": "speed", "workers": args.workers, "progress": tell}
        report = prepare(source, Tokenizer(args.tokenizer), Path(cache), **options).report
        seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    # the last call tells the end of the files, after the last batch of tokens
    last = next(index for index, entry in enumerate(written) if entry[1] == report["tokens"])
    (first_time, first_tokens), (last_time, last_tokens) = written[0], written[last]
    found = {
        "tokens": report["tokens"],
        "steady": (last_time - first_time) / (last_tokens - first_tokens) * 1e6,
        "call": seconds / report["tokens"] * 1e6,
        "cpu": cpu / report["tokens"] * 1e6 / args.workers,
        "peak_bytes": peak_bytes() + sum(workers.values()),
    }
    print(json.dumps(found))


def texts_of(args: argparse.Namespace) -> Iterator[str]:
    """Every text of the source that says something."""
    from bc2exp.data.rows import Row
    from bc2exp.data.sources import find_source, read_rows

    rows = read_rows(find_source("file", str(args.source), args.column))
    return (row.text for row in rows if isinstance(row, Row) and row.text)


def run_raw(args: argparse.Namespace) -> None:
    """Encode once with nothing but SentencePiece, and print what it took."""
    import sentencepiece

    begin, cpu = time.perf_counter(), cpu_seconds()
    texts = list(texts_of(args))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(args.tokenizer))
    middle = time.perf_counter()
    tokens = sum(map(len, processor.encode(texts, num_threads=args.workers)))
    end, cpu = time.perf_counter(), cpu_seconds() - cpu
    found = {
        "tokens": tokens,
        "steady": (end - middle) / tokens * 1e6,
        "call": (end - begin) / tokens * 1e6,
        "cpu": cpu / tokens * 1e6 / args.workers,
    }
    print(json.dumps(found))


SIDES = {"ours": run_ours, "raw": run_raw}


def write_lines(args: argparse.Namespace, path: Path) -> None:
    """The texts as Megatron's preprocess_data wants them."""
    with path.open("w", encoding="utf-8") as lines:
        for text in texts_of(args):
            lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def run(side: str, measure: str, args: argparse.Namespace, source: Path) -> dict[str, Any]:
    """One measurement in a process of its own; of Megatron's ways `source` is a file of JSON lines."""
    if side in MEGATRON:
        python = args.peer if side == "hugging face" else sys.executable
        command = [str(python), str(Path(__file__).with_name("megatron_way.py")), "--lines", str(source)]
        command += ["--kind", MEGATRON[side]]
    else:
        command = [sys.executable, __file__, "--side", side, "--measure", measure]
        command += ["--source", str(source), "--column", args.column]
    command += ["--tokenizer", str(args.tokenizer), "--workers", str(args.workers)]
    begin = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - begin
    found = json.loads(done.stdout)
    return {**found, "process": seconds / found["tokens"] * 1e6}


def measure_speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The sides in turn."""
    samples = []
    tokens = set()
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "lines.jsonl")
        write_lines(args, lines)
        for number in range(args.rounds):
            for side in (*SIDES, *MEGATRON):
                found = run(side, "speed", args, lines if side in MEGATRON else args.source)
                print(json.dumps({"round": number, "side": side, **found}), flush=True)
                tokens.add(found["tokens"])
                assert len(tokens) == 1, f"{side} has other tokens than the sides before: {tokens}"
                samples += [
                    {"case": way, "side": side, "round": number, "values": [found[way]]} for way in WAYS
                ]
    return samples


def measure_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Our peak, of the source once and many times."""
    import pyarrow as pa
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(args.source, columns=[args.column])
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, args.times):
            many = pa.concat_tables([table] * times)
            path = Path(folder, f"{times}.parquet")
            pyarrow.parquet.write_table(many, path, row_group_size=len(many))
            found = run("ours", "memory", args, path)
            print(json.dumps({"times": times, **found}), flush=True)
            values = [found["peak_bytes"] / 2**20]
            samples.append({"case": "memory", "side": f"rows {times} times", "round": 0, "values": values})
    return samples


def ratios(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the samples come to."""
    values: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        values.setdefault((sample["case"], sample["side"]), []).extend(sample["values"])
    found = [
        record.ratio(way, f"tokens/s against {side}", values[way, side], values[way, "ours"],
                     better="higher", target=TARGETS.get((side, way)))
        for side in ("raw", *MEGATRON)
        for way in WAYS
    ]  # fmt: skip
    peaks = {side: values[case, side] for case, side in values if case == "memory"}
    if peaks:
        (_, once), (often, many) = peaks.items()
        name = f"peak with the {often}"
        found.append(record.ratio("memory", name, many, once, better="lower", target=1.1, margin=0.05))
    return found


def main() -> None:
    """Measure speed, then memory, and leave the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--column", default="text")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--peer", type=Path, help="Python with transformers; else BC2EXP_PEER, else one is made"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=10, help="0: no memory is measured")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        SIDES[args.side](args)
        return
    args.source = real_data.find(args.source, real_data.ALPACA, "--source")
    args.tokenizer = real_data.find(args.tokenizer, real_data.TOKENIZER, "--tokenizer")
    args.peer = peers.interpreter(args.peer)
    samples = measure_speed(args)
    if args.times:
        samples += measure_memory(args)
    entries = ratios(samples)
    sides = {
        "ours": "bc2exp.data.prepare",
        "raw": "SentencePieceProcessor.encode of all texts, nothing is written",
        "megatron way": f"Pool.imap document by document, {CHUNK} at a time; .bin and .idx with numpy",
        "hugging face": "the same with the tokenizer in transformers' class for SentencePiece",
    }
    whole = {"unit": "s a million tokens; memory: MiB"}
    whole |= {"sides": sides, "samples": samples, "ratios": entries}
    record.write("prepare", whole, args.results)
    print(json.dumps(entries, indent=1))


if __name__ == "__main__":
    main()
