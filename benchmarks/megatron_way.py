"""What Megatron-LM's preprocess_data does with a file of JSON lines, written anew.

    python benchmarks/megatron_way.py --lines FILE --tokenizer FILE --workers 2 --kind sentencepiece

A pool whose workers encode document by document, imap by 25, and one process that adds each to a .bin and in
the end writes the .idx. `--kind` is the tokenizer of a worker: `sentencepiece`, the library alone, or
`hugging face`, the library in the class that transformers has for such models; ModelLink calls a tokenizer of
Hugging Face there, too. Nothing is added before or after a text. Prints tokens and seconds as JSON, see
`prepare.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 25
"""Documents that a worker is handed at once."""


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def load(kind: str, file: Path) -> Any:
    """A tokenizer."""
    if kind == "hugging face":
        from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

        return SentencePieceBackend(vocab_file=str(file))
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def load_tokenizer(kind: str, file: Path) -> None:
    """A worker's own, a global of its process as in Megatron's."""
    global tokenizer, options
    tokenizer = load(kind, file)
    options = {"add_special_tokens": False} if kind == "hugging face" else {}


def encode_document(line: str) -> list[int]:
    """The ids of one document, in a worker."""
    return list(tokenizer.encode(json.loads(line)["text"], **options))


def documents(path: Path) -> Iterator[str]:
    """The lines of a file."""
    with path.open(encoding="utf-8") as lines:
        yield from lines


def write_index(file: Path, lengths: list[int]) -> None:
    """The .idx of documents of one sequence each: lengths, byte offsets, and where documents begin."""
    import numpy as np

    sizes = np.array(lengths, dtype=np.int32)
    offsets = np.concatenate(([0], np.cumsum(sizes[:-1], dtype=np.int64) * sizes.itemsize))
    documents = np.arange(len(sizes) + 1, dtype=np.int64)
    # magic, version, the code of int32, sequences, documents and one more
    header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 4, len(sizes), len(documents))
    file.write_bytes(header + sizes.tobytes() + offsets.tobytes() + documents.tobytes())


def main() -> None:
    """Encode, write a store, and print what it took."""
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--kind", choices=("sentencepiece", "hugging face"), required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begin, cpu = time.perf_counter(), cpu_seconds()
        lengths: list[int] = []
        first = 0.0
        with (
            multiprocessing.Pool(args.workers, load_tokenizer, (args.kind, args.tokenizer)) as pool,
            open(f"{folder}/text.bin", "wb") as store,
        ):
            for ids in pool.imap(encode_document, documents(args.lines), CHUNK):
                store.write(np.array(ids, dtype=np.int32).tobytes())
                lengths.append(len(ids))
                first = first or time.perf_counter()
            last = time.perf_counter()
            store.close()
            write_index(Path(folder, "text.idx"), lengths)
            seconds = time.perf_counter() - begin
            pool.close()
            pool.join()
        cpu = cpu_seconds() - cpu
    tokens = sum(lengths)
    found = {
        "tokens": tokens,
        "steady": (last - first) / (tokens - lengths[0]) * 1e6,
        "call": seconds / tokens * 1e6,
        "cpu": cpu / tokens * 1e6 / args.workers,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
