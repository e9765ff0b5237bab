"""Train the embedded tokenizer: `python -m bc2exp.embedded.train_tokenizer [--output PATH] [--vocab-size N]`.

It has the properties of the genuine Baichuan2 tokenizer at a small size: BPE with byte fallback, no
normalisation, no dummy prefix, single digits, `<unk>` 0, `<s>` 1, `</s>` 2, no padding piece, and the two
pieces that open a user's and an assistant's turn. The same texts give the same bytes on every run. As with
every SentencePiece model, all text comes back from its ids except U+2581, its own sign for a space.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from bc2exp.embedded import CORPUS, REVIEWS, TOKENIZER
from bc2exp.storage.atomic import write_bytes

VOCAB_SIZE = 2048
USER_PIECE = "<reserved_106>"
ASSISTANT_PIECE = "<reserved_107>"
# The whole text takes 73,094 tokens at 0.995, 86,037 at 0.999 and 104,253 at 1.0, where rare characters use
# up the places of longer pieces. Below 0.995 it is hardly shorter, and far more of it falls back to bytes.
CHARACTER_COVERAGE = 0.995


def texts() -> Iterator[str]:
    """Every document of the two corpora, then every review."""
    for path in CORPUS:
        with path.open(encoding="utf-8", newline="\n") as file:
            yield from (line.rstrip("\n") for line in file)
    with REVIEWS.open(encoding="utf-8", newline="") as file:
        yield from (row["review"] for row in csv.DictReader(file))


def train(vocab_size: int = VOCAB_SIZE) -> bytes:
    """The content of a `tokenizer.model` with `vocab_size` pieces.

    Raises RuntimeError, from sentencepiece, where the texts cannot give that many pieces or need more.
    """
    model = io.BytesIO()
    # an iterator and a writer, because the model file would record the names of input and output files
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts(),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        character_coverage=CHARACTER_COVERAGE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        max_sentencepiece_length=32,
        user_defined_symbols=[USER_PIECE, ASSISTANT_PIECE],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and put the model file in its place in one step; exit 1 with a message where that fails."""
    parser = argparse.ArgumentParser(
        "python -m bc2exp.embedded.train_tokenizer", description="Train the embedded tokenizer."
    )
    parser.add_argument("--output", type=Path, default=TOKENIZER, help="model file (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="pieces (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        content = train(options.vocab_size)
        write_bytes(options.output, content)
    except (OSError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{options.output}: {options.vocab_size} pieces, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
