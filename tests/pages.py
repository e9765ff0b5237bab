"""Pages that people read, in two languages, cut into what tests compare and run."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def read(name: str) -> str:
    """The text of a page, named from the repository."""
    return (REPOSITORY / name).read_text(encoding="utf-8")


def fenced(name: str, kind: str = "") -> list[str]:
    """The fenced blocks of a page, their kind in the first line; those of one kind where it is named."""
    blocks = read(name).split("```")[1::2]
    return [block for block in blocks if not kind or block.partition("\n")[0] == kind]


def commands(name: str) -> list[str]:
    """The command lines of a page, in order."""
    return [line for block in fenced(name, "bash") for line in block.splitlines()[1:]]


def table(name: str, number: int) -> list[list[str]]:
    """The cells of the rows of a table of a page, counted from 0 (-1 is the last), without its heading."""
    tables = re.findall(r"(?:^\|.*\n)+", read(name), re.MULTILINE)
    rows = tables[number].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def shape(name: str) -> list[str]:
    """The headings, rows of tables, list items and fences of a page, in order."""
    return re.findall(r"^(##+ |\||- |```\w*)", read(name), re.MULTILINE)


def broken_links(name: str) -> list[str]:
    """The links of a page, counted from its folder, that lead to no file."""
    targets = re.findall(r"\]\(([^)#]+)\)", read(name))
    return [target for target in targets if not ((REPOSITORY / name).parent / target).is_file()]
