"""Preparing a small source in tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bc2exp.data.prepare import Prepared, prepare
from bc2exp.data.sources import TextSource, find_source
from bc2exp.embedded import TOKENIZER
from bc2exp.text.tokenizer import Tokenizer

TEXTS = [f"第{n}份 outside, {'very ' * (n % 40)}late <s>\t{n * 7919}" for n in range(900)]


def source_of(folder: Path, texts: list[str] = TEXTS) -> TextSource:
    """A jsonl of the texts."""
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    os.utime(path, (1.6e9, 1.6e9))  # old enough for its fingerprint to be remembered
    return find_source("file", str(path), "text")


def prepare_texts(source: TextSource, cache: Path, **options: Any) -> Prepared:
    """Prepare with the embedded tokenizer."""
    return prepare(source, Tokenizer(TOKENIZER), cache, name="text", **options)


def content_of(prepared: Prepared) -> dict[str, bytes]:
    """The files of a store that are the same at every preparation."""
    return {
        path.name: path.read_bytes()
        for path in prepared.prefix.parent.iterdir()
        if path.name != "report.json"
    }


def remains_in(cache: Path) -> list[str]:
    """What lies in a cache beside locks and the memory of fingerprints."""
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock" and p.name != "fingerprints.json")
