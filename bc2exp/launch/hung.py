"""What is said of ranks that hang: which, in what, for how long, and where every rank is in its code."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from bc2exp.launch import processes, stacks
from bc2exp.launch.signs import Rank, Signs
from bc2exp.storage.atomic import write_text

_STATES = {
    "T": "its process {pid} is stopped",
    "D": "its process {pid} hangs in the system, at a disk or a device",
}


def find(signs: Signs) -> dict[int, str]:
    """The ranks that hang, and a sentence of each."""
    found = {}
    for number, seconds in signs.silent().items():
        rank = signs.ranks[number]
        if rank.pid is not None and not processes.alive(rank.pid):
            rank.ended = True  # its death is another story, which torchrun tells
            continue
        found[number] = f"no sign of life for {seconds:.0f} s: {_state(rank)}"
    if not found:
        for number, seconds in signs.behind().items():
            found[number] = f"it lives, but the others have waited for it for {seconds:.0f} s"
    return found


def stacks_of(signs: Signs, logs: Path, file: Path) -> str:
    """Ask all ranks for their stacks, and leave them in `file`; the innermost frames, a line a rank.

    Args:
        signs: what is known of the ranks.
        logs: the folder of their logs.
        file: gets every stack of every rank.
    """
    going = {number: rank for number, rank in signs.ranks.items() if rank.pid is not None and not rank.ended}
    answers = stacks.ask({number: rank.pid for number, rank in going.items() if rank.pid is not None}, logs)
    whole, lines = [], []
    for number, rank in going.items():
        head = f"rank {number}, {rank.words}"
        silence = f"no stack: {_state(rank)}"
        whole.append(f"{head}, process {rank.pid}\n{answers[number] or silence}\n")
        lines.append(f"{head}: {', '.join(stacks.frames(answers[number])) or silence}")
    with suppress(OSError):  # on a full disk; the lines are told nevertheless
        write_text(file, "\n".join(whole))
    return "\n".join(lines)


def sentence(signs: Signs, found: dict[int, str], where: str) -> str:
    """Why a run ends in which ranks hang; `where` says on which machine, or nothing."""
    first, *more = found
    rank = signs.ranks.get(first) or signs.elsewhere[first]
    others = f", as does rank {', '.join(map(str, more))}" if more else ""
    return f"rank {first}{where} hangs{others}; last sign: {rank.words}; {found[first]}"


def _state(rank: Rank) -> str:
    if rank.pid is None:
        return "it has said nothing since its start"
    letter = processes.state(rank.pid) or ""
    return _STATES.get(letter, "its process {pid} runs, but its interpreter is held").format(pid=rank.pid)
