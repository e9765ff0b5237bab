"""Which files a `dataset.path` means. Asked at the door, and again when they are read."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from bc2exp.config.errors import UserError
from bc2exp.config.roots import nearest

TEXT_SUFFIXES = (".parquet", ".csv", ".jsonl", ".txt")
STORE_SUFFIXES = (".bin", ".idx")

# Files that make a folder a run or a store, and the lists of bad rows beside stores: whoever names the folder
# that commands are typed in means none of them.
_OUR_OWN = frozenset({"run.json", "tokens.idx"})
_LISTED = "quarantine.jsonl"


def find_text_files(path: str, typed: str | None = None) -> tuple[Path, ...]:
    """The files of text that a path, a folder or a pattern means, sorted.

    Args:
        path: a file, a folder (all files in it and below whose suffix is known), or a pattern with `*`, `?`,
            `[…]` and `**`. What exists is never taken for a pattern.
        typed: what errors call it; None: `path`.

    Raises:
        UserError: nothing there, nothing of a known suffix, or something that may not be read.
    """
    key, found = f"dataset.path={typed or path}", Path(path).expanduser()
    if found.is_dir():
        files = _walk(found, key)
    elif os.path.exists(found):
        files = [found]
    elif glob.has_magic(path):
        files = [Path(name) for name in glob.glob(str(found), recursive=True) if os.path.isfile(name)]
        if not files:
            raise UserError(f"{key}: no file matches this pattern")
    else:
        raise UserError(f"{key}: no such file or folder{nearest(found)}")
    known = sorted(file for file in files if file.suffix.lower() in TEXT_SUFFIXES)
    if not known:
        where = "" if files == [found] else f": none of the {len(files)} files there"
        raise UserError(f"{key}{where}: cannot be read; {', '.join(TEXT_SUFFIXES)} can")
    for file in known:
        if not os.access(file, os.R_OK):
            which = "" if file == found else f": {file}"
            raise UserError(f"{key}{which}: may not be read (permissions)")
    return tuple(known)


def find_store(path: str, typed: str | None = None) -> Path | None:
    """The prefix of the token store that a path names by its .bin or .idx; None for anything else.

    Raises:
        UserError: one of the two files is not there.
    """
    file = Path(path)
    if file.suffix not in STORE_SUFFIXES:
        return None
    key = f"dataset.path={typed or path}"
    if not os.path.isfile(file):
        raise UserError(f"{key}: no such file{nearest(file)}")
    for suffix in STORE_SUFFIXES:
        if not os.path.isfile(file.with_suffix(suffix)):
            raise UserError(
                f"{key}: there is no {file.with_suffix(suffix).name} beside it; a token store is a .bin and "
                "an .idx of one name"
            )
    return file.with_suffix("")


def needs_column(files: tuple[Path, ...]) -> Path | None:
    """The first file whose text is in a column or under a key."""
    return next((file for file in files if file.suffix.lower() != ".txt"), None)


def _walk(folder: Path, key: str) -> list[Path]:
    """Files in a folder and below; hidden ones, runs and prepared stores are no data."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{key}: {error.filename}: cannot be read: {error.strerror}") from None

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        if _OUR_OWN.intersection(names):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".") and _LISTED not in name]
    return files
