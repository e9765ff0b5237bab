"""From files of text to a token store in a cache, once.

`<cache>/<name>-<first 12 digits of the key>/` holds `tokens.bin`, `tokens.idx`, `report.json` and
`quarantine.jsonl` (the bad rows). The key is a digest of everything that decides the tokens: the content of
the files and of the tokenizer, and the options. So an edited file makes another store, a moved one does not.

The folder is written aside, as `.<folder>.partial`, and takes its name when it is complete and on the disk. A
lock for each store lets processes that want the same one wait for the first of them. Partial folders whose
lock nobody holds are what a kill has left; every start removes them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bc2exp.config.errors import UserError
from bc2exp.data import quarantine
from bc2exp.data.building import OnProgress, Progress, build_store, ignore_progress
from bc2exp.data.fingerprints import Stamp, fingerprints, stamp
from bc2exp.data.quarantine import Limits, Quarantine, TooManyBadRows
from bc2exp.data.rows import Meter, printable
from bc2exp.data.sources import TextSource, check_columns
from bc2exp.data.store import REPORT, TokenStore
from bc2exp.storage import atomic, lock
from bc2exp.text.tokenizer import Tokenizer

# A part of the key: raised whenever the same input gives other tokens or other files than before.
FORMAT = 1
PREFIX = "tokens"
QUARANTINE = "quarantine.jsonl"

_NO_WRITING = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}


class Prepared(NamedTuple):
    """A finished store.

    Attributes:
        prefix: of its `.bin` and `.idx`.
        report: what its `report.json` holds: see `build_store`, and `key`, `prefix`, the options, the
            tokenizer, the `sources` with their digests.
        reused: whether the cache held it already.
    """

    prefix: Path
    report: dict[str, Any]
    reused: bool


def prepare(
    source: TextSource,
    tokenizer: Tokenizer,
    cache: Path,
    *,
    name: str,
    append_eos: bool = False,
    workers: int = 1,
    limits: Limits | None = None,
    progress: OnProgress = ignore_progress,
) -> Prepared:
    """The token store of a source, made where the cache does not hold it.

    Args:
        source: the files.
        tokenizer: the SentencePiece model.
        cache: a folder for stores, made where there is none.
        name: of the data set; begins the name of the store's folder and decides nothing else.
        append_eos: end every document with the end-of-text token.
        workers: processes that encode; the store is the same with any number.
        limits: how many bad rows are tolerated, in a store from the cache as well.
        progress: is told how far it has come, several times a second where there is much to do.

    Raises:
        UserError: a file or the tokenizer that is not what it should be, no text at all, files that change
            while they are read, a folder that cannot be written, a damaged store in the cache.
        TooManyBadRows: beyond the limits. No store is left, and `<folder>.quarantine.jsonl` lists them.
    """
    limits = limits or Limits()
    options = _options(source, tokenizer, append_eos)
    check_columns(source)
    stamps = [stamp(path) for path in source.files]
    bytes_total = sum(stamp.size for stamp in stamps)
    build = functools.partial(
        build_store,
        source,
        tokenizer,
        append_eos=append_eos,
        workers=workers,
        bytes_total=bytes_total,
        progress=progress,
    )
    with _writing(cache):
        _make_folder(cache)
        digests = fingerprints(source.files, cache, _told(progress, bytes_total))
        key = _key(options, source.files, digests)
        folder = cache / f"{_safe(name)}-{key[:12]}"
        about = {"key": key, **options, "tokenizer": printable(tokenizer.path.absolute())}
        about["sources"] = [
            {"path": printable(path.absolute()), "bytes": before.size, "sha256": digest}
            for path, before, digest in zip(source.files, stamps, digests, strict=True)
        ]
        _remove_leftovers(cache)
        report = _find(folder, key)
        if report is None:
            with _locked(folder, lambda: progress(Progress("wait", 0, 0, 0, bytes_total))):
                # somebody else may have made it while this process waited
                report = _find(folder, key)
                if report is None:
                    report = _make(folder, about, build, limits, dict(zip(source.files, stamps, strict=True)))
                    return Prepared(folder / PREFIX, report, reused=False)
    num_bad = sum(report["bad"].values())
    if num_bad > limits.allowed(report["rows"]):
        quarantine.refuse(num_bad, report["rows"], limits, folder / QUARANTINE)
    return Prepared(folder / PREFIX, report, reused=True)


def _make(
    folder: Path,
    about: dict[str, Any],
    build: Callable[..., dict[str, Any]],
    limits: Limits,
    stamps: dict[Path, Stamp],
) -> dict[str, Any]:
    """Write the folder of a store and give it its name; returns the report."""
    partial = _partial_of(folder)
    # beside the folder, where it can be read if reading stops for what it lists
    listed = folder.with_name(f"{folder.name}.{QUARANTINE}")
    # of a process that was killed while this one waited
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with Quarantine(listed, limits) as bad_rows:
            counts = build(partial / PREFIX, quarantine=bad_rows)
        for path, before in stamps.items():
            if stamp(path)[:2] != before[:2]:
                raise UserError(
                    f"dataset.path={path}: was changed while it was read; start again when it is at rest"
                )
        num_bad = sum(counts["bad"].values())
        if not counts["documents"] and num_bad:
            quarantine.refuse_all(num_bad, counts["rows"], listed)
        if not counts["documents"]:
            raise UserError(
                f"dataset.path={next(iter(stamps))}: holds no text: all {counts['rows']} rows are empty"
            )
        report = {"prefix": PREFIX, **counts, **about}
        os.replace(listed, partial / QUARANTINE)
        atomic.write_json(partial / REPORT, report)
        atomic.publish_folder(partial, folder)
    except BaseException as error:
        if not isinstance(error, TooManyBadRows):
            listed.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _find(folder: Path, key: str) -> dict[str, Any] | None:
    """The report of a finished store; None where there is none."""
    if not folder.exists():
        return None
    try:
        report = json.loads((folder / REPORT).read_bytes())
        found = TokenStore(folder / PREFIX)
        fits = report["key"] == key and report["tokens"] == len(found.tokens)
    except (OSError, ValueError, KeyError, TypeError) as error:
        # what follows a semicolon is advice for stores that nobody here can make again
        reason = str(error).partition(";")[0]
        raise UserError(f"{folder}: is damaged: {reason}; remove it, and it is prepared again") from None
    if not fits:
        raise UserError(
            f"{folder}: is damaged: its report is of another store; remove it, and it is prepared again"
        )
    return report


def _options(source: TextSource, tokenizer: Tokenizer, append_eos: bool) -> dict[str, Any]:
    """What decides the tokens beside the content of the files."""
    return {
        "format": FORMAT,
        "column": source.column,
        "alternate": source.alternate,
        "max_row_bytes": source.max_row_bytes,
        "append_eos": append_eos,
        "tokenizer_sha256": tokenizer.digest,
    }


def _key(options: dict[str, Any], files: Sequence[Path], digests: list[str]) -> str:
    # the suffix tells how the bytes are read
    content = [[path.suffix.lower(), digest] for path, digest in zip(files, digests, strict=True)]
    return hashlib.sha256(json.dumps({**options, "files": content}, sort_keys=True).encode()).hexdigest()


def _told(progress: OnProgress, bytes_total: int) -> Callable[[int], None]:
    meter = Meter()

    def count(num_bytes: int) -> None:
        meter.bytes_done += num_bytes
        progress(Progress("fingerprint", 0, 0, meter.bytes_done, bytes_total))

    return count


def _make_folder(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # above it are folders that hold none, such as those of /proc
        raise UserError(f"{cache}: the prepared data cannot be written there: {error}") from None


def _safe(name: str) -> str:
    return re.sub(r"\W+", "_", name) or "text"


def _partial_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _locked(folder: Path, tell_waiting: Callable[[], None]) -> lock.Lock:
    """The lock of a store, when whoever has it lets go."""
    try:
        return lock.hold(_lock_of(folder))
    except lock.LockHeld:
        tell_waiting()
        return lock.hold(_lock_of(folder), wait_seconds=float("inf"))


def _remove_leftovers(cache: Path) -> None:
    """Remove what killed processes have left; what has a living owner stays."""
    for partial in cache.glob(".*.partial"):
        folder = cache / partial.name[1 : -len(".partial")]
        try:
            with lock.hold(_lock_of(folder)):
                # its owner may have ended well in the meantime
                if not partial.exists():
                    continue
                shutil.rmtree(partial, ignore_errors=True)
                folder.with_name(f"{folder.name}.{QUARANTINE}").unlink(missing_ok=True)
        except lock.LockHeld:
            continue


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Names the folder where the disk refuses to be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_WRITING:
            raise
        raise UserError(f"{cache}: the prepared data cannot be written there: {error}") from None
