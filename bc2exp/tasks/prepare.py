"""Text to a token store: a task of its own, and the first thing that training on text does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bc2exp.config.dataset import DatasetConfig
from bc2exp.config.errors import UserError
from bc2exp.config.root import Config
from bc2exp.config.text_files import find_store
from bc2exp.data import prepare as preparation
from bc2exp.data.quarantine import Limits
from bc2exp.data.sources import find_source
from bc2exp.data.store import TokenStore
from bc2exp.data.tokens import TokenStream
from bc2exp.hardware.phase import DATA, phase
from bc2exp.parallel.world import World
from bc2exp.storage import atomic
from bc2exp.tasks import build
from bc2exp.tasks.telling import Told
from bc2exp.text.tokenizer import Tokenizer, find_tokenizer
from bc2exp.tracking.journal import Journal, NullJournal

PARTS = ("train", "held_out", "test")


def prepare(config: Config, folder: Path, world: World, journal: Journal | NullJournal) -> str:
    """Make the token store of the configured data set; leaves `report.json` in `folder`."""
    data, length = config.dataset, config.dataset.sequence_length
    tokenizer = Tokenizer(find_tokenizer(config.model.tokenizer, config.model.weights))
    vocab_size = build.find_vocabulary(config.model, tokenizer, journal)
    store, report = open_store(data, tokenizer, journal)
    store.check_vocabulary(vocab_size)
    streams = dict(zip(PARTS, store.streams(data.split), strict=True))
    journal.event("data", **described(data, tokenizer, streams))
    num_bad = sum(report.get("bad", {}).values())
    counts = {"documents": store.num_documents, "tokens": len(store.tokens), "bad_rows": num_bad}
    journal.metrics(0, {f"data/{name}": count for name, count in counts.items()})
    parts = {
        part: {
            "documents": stream.num_documents,
            "tokens": len(stream.tokens),
            "samples": stream.num_samples(length),
        }
        for part, stream in streams.items()
    }
    whole = {**report, **counts, "store": str(store.prefix), "sequence_length": length, "parts": parts}
    atomic.write_json(folder / "report.json", whole)
    return "done"


@phase(DATA)
def open_store(
    data: DatasetConfig, tokenizer: Tokenizer, journal: Journal | NullJournal
) -> tuple[TokenStore, dict[str, Any]]:
    """The token store of a data set, made where the cache does not hold it, and what is known of its making.

    Every rank may call it: one of them prepares, the others wait for it. Call it before any exchange between
    ranks, as those have time limits and preparation takes as long as it takes.
    """
    prefix = find_store(data.path) if data.path else None
    if prefix is not None:
        store = TokenStore(prefix)
        report = store.report() or {}
        made_with = report.get("tokenizer_sha256", tokenizer.digest)
        if made_with != tokenizer.digest:
            raise UserError(
                f"dataset.path={data.path}: was prepared with another tokenizer ({report.get('tokenizer')}, "
                f"sha256 {made_with[:12]}) than model.tokenizer={tokenizer.path} ({tokenizer.digest[:12]})"
            )
        if not report:
            journal.event(
                "note",
                text=f"{prefix}: does not say which tokenizer made it; its tokens fit the vocabulary, but "
                "only you know that they mean the same",
            )
        return store, {**report, "reused": True}
    prepared = preparation.prepare(
        find_source(data.source.value, data.path, data.column, data.max_row_bytes),
        tokenizer,
        Path(data.cache),
        name=data.name,
        append_eos=data.append_eos,
        workers=data.workers or len(os.sched_getaffinity(0)),
        limits=Limits(data.max_bad_rows, data.max_bad_fraction),
        progress=Told(journal, "preparing"),
    )
    bad = prepared.report["bad"]
    if bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad.items())
        journal.event(
            "note",
            text=f"bad rows were left out: {sum(bad.values())} ({reasons}); they are listed in "
            f"{prepared.prefix.parent / preparation.QUARANTINE}",
        )
    return TokenStore(prepared.prefix), {**prepared.report, "reused": prepared.reused}


def described(data: DatasetConfig, tokenizer: Tokenizer, streams: dict[str, TokenStream]) -> dict[str, Any]:
    """What the journal says of a data set."""
    train, length = streams["train"], data.sequence_length
    return {
        "name": data.name,
        "path": data.path or data.source.value,
        "digest": train.digest()[:36],
        "documents": sum(stream.num_documents for stream in streams.values()),
        "tokens": sum(len(stream.tokens) for stream in streams.values()),
        "train_tokens": len(train.tokens),
        "train_samples": train.num_samples(length),
        "held_out_samples": streams["held_out"].num_samples(length),
        "unigram_entropy": train.unigram_entropy(),
        "tokenizer": tokenizer.digest,
    }
