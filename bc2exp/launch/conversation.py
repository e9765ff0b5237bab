"""The terminal's side of task=generate: what is asked goes to the ranks, what they say is shown as it comes.

Ranks have no terminal: their standard input is the parent's life, their output a log. What passes between is
in files of the run folder (`tracking.talk`). Nothing here waits: the parent looks after its ranks meanwhile.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console

from bc2exp.config.errors import UserError
from bc2exp.config.nodes import Nodes
from bc2exp.tracking.progress import Progress
from bc2exp.tracking.talk import REQUESTS, STREAM, Lines, Streams

_READ_BYTES = 1 << 16
_PASTED_SECONDS = 0.05
_ENDINGS = {"length": "[as long as task.max_new_tokens or task.context allows]", "stopped": "[stopped]"}
HELP = "a chat: Enter sends, /clear begins a new one, /exit or Ctrl-D ends it"


class Shown(Protocol):
    """What shows the records of a journal, within a `with`."""

    def update(self, record: dict[str, Any]) -> None:
        """Show a record."""

    def __enter__(self) -> Shown:
        """Begin."""

    def __exit__(self, *_: object) -> None:
        """End, with everything shown."""


class Conversation(Protocol):
    """What the parent of a run does beside watching."""

    stopping: str
    """What is said when a stop is asked for."""

    def begin(self, folder: Path) -> None:
        """The run has its folder; its ranks are not started yet."""

    def progress(self) -> Shown:
        """What shows the journal."""

    def tend(self, *, stop: bool) -> None:
        """Do what there is to do, without waiting. `stop`: the person asked for an end."""


class NoConversation:
    """For tasks that say nothing but their progress.

    Args:
        progress: makes what shows it; None: a live bar on a terminal, lines elsewhere.
    """

    stopping = "stopping after this step and saving; once more (Ctrl-C) ends it at once"

    def __init__(self, progress: Callable[[], Shown] | None = None) -> None:
        self._progress = progress

    def begin(self, folder: Path) -> None:
        """Nothing is passed on."""

    def progress(self) -> Shown:
        """See `Conversation`."""
        return self._progress() if self._progress is not None else Progress(None)

    def tend(self, *, stop: bool) -> None:
        """Nothing is said."""


def converse(
    plain: dict[str, Any],
    nodes: Nodes,
    *,
    sweep: bool = False,
    progress: Callable[[], Shown] | None = None,
) -> Conversation:
    """The conversation that a configuration asks for; reads a standard input that is no terminal to its end.

    Args:
        plain: the configuration.
        nodes: the machines of the run.
        sweep: the run is a job of one.
        progress: makes what shows the progress of a task that says nothing else; None: its own.

    Raises UserError where there is nothing to answer, and for a chat that nobody could hold.
    """
    task = plain["task"]
    if task["name"] != "generate":
        return NoConversation(progress)
    if task["prompt"] is not None:
        return Prompts([task["prompt"]])
    if task["prompts"]:
        return Prompts(list(task["prompts"]))
    if task["file"] is not None:
        return Prompts(_lines(Path(task["file"]).read_bytes(), f"task.file={task['file']}"))
    if sweep:
        raise UserError(
            "task=generate: a sweep needs its prompts named: task.prompt, task.prompts or task.file"
        )
    if sys.stdin is None or not sys.stdin.isatty():
        given = b"" if sys.stdin is None else sys.stdin.buffer.read()
        return Prompts(_lines(given, "standard input"))
    if nodes.count > 1:
        raise UserError(
            f"launch.nnodes={nodes.count}: a chat is held on one machine; name prompts (task.prompt, "
            "task.prompts, task.file) to have them answered on several"
        )
    if task["format"] != "chat":
        raise UserError(
            f"task.format={task['format']}: a chat has turns; name what is to go on by task.prompt=..., or "
            "choose task.format=chat"
        )
    return Chat(sys.stdin, sys.stdout)


def _lines(content: bytes, key: str) -> list[str]:
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{key}: is not UTF-8; save the prompts as UTF-8") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(
            f"{key}: holds no prompt; name one by task.prompt=..., several by task.prompts or task.file, or "
            "start on a terminal for a chat"
        )
    return prompts


class _Screen:
    """What both kinds have: requests to ranks, and answers on the screen."""

    stopping = "stopping; once more (Ctrl-C) ends it at once"

    def begin(self, folder: Path) -> None:
        """See `Conversation`."""
        for old in (folder / REQUESTS, *folder.glob(STREAM.format(copy="*"))):
            old.unlink(missing_ok=True)  # of an earlier part of a run in this folder
        self._requests = Lines(folder / REQUESTS)
        self._streams = Streams(folder)

    def progress(self) -> Progress:
        """Lines: a bar would be drawn into what is said."""
        return Progress(None, Console(force_terminal=False))


class Prompts(_Screen):
    """Prompts that are known beforehand; their answers are shown in order, the first open one as it comes."""

    def __init__(self, prompts: list[str]) -> None:
        self._prompts = prompts
        self._waiting: dict[int, list[str]] = {number: [] for number in range(len(prompts))}
        self._ended: dict[int, str] = {}
        self._current = 0
        self._headed = False

    def begin(self, folder: Path) -> None:
        """See `Conversation`."""
        super().begin(folder)
        for prompt in self._prompts:
            self._requests.write(prompt=prompt)
        self._requests.write(end=True)

    def tend(self, *, stop: bool) -> None:
        """See `Conversation`."""
        for said in self._streams.poll():
            if "number" in said:
                self._take(said["number"], said)
        self._show()

    def _take(self, number: int, said: dict[str, Any]) -> None:
        if "left_out" in said:
            self._waiting[number].append(_left_out(said["left_out"]))
        self._waiting[number].append(said.get("text", ""))
        if "ended" in said:
            self._ended[number] = said["ended"]

    def _show(self) -> None:
        while self._current < len(self._prompts):
            number = self._current
            text = "".join(self._waiting[number])
            self._waiting[number] = []
            if not text and number not in self._ended:
                return
            if not self._headed:
                print(f"> {self._prompts[number]}")
                self._headed = True
            print(text, end="", flush=True)
            if number not in self._ended:
                return
            print(f"\n{_ending(self._ended[number])}", flush=True)
            self._current, self._headed = number + 1, False


class Chat(_Screen):
    """Turns by turns with whoever sits at the terminal."""

    def __init__(self, keyboard: TextIO, screen: TextIO) -> None:
        self._descriptor = keyboard.fileno()
        self._screen = screen
        self._typed = b""
        self._open = True  # requests may be written
        self._asking = False  # it is the person's turn

    def tend(self, *, stop: bool) -> None:
        """See `Conversation`."""
        for said in self._streams.poll():
            if "left_out" in said:
                self._print(_left_out(said["left_out"]))
            if "text" in said:
                self._print(said["text"])
            if "ended" in said:
                self._print("\n" + _ending(said["ended"]))
            if "ready" in said:
                self._print(HELP + "\n")
            if ("ready" in said or "ended" in said) and not stop:
                self._ask()
        if stop:
            self._end()
        elif self._asking:
            self._listen()

    def _ask(self) -> None:
        self._asking = True
        self._print("> ")

    def _listen(self) -> None:
        """Take what was typed, if something was. Lines that come at once were pasted, and are one turn."""
        wait = 0.0
        while select.select([self._descriptor], [], [], wait)[0]:
            data = os.read(self._descriptor, _READ_BYTES)
            if not data:
                self._print("\n")
                return self._end()
            self._typed, wait = self._typed + data, _PASTED_SECONDS
        if not self._typed.endswith(b"\n"):
            return None
        text, self._typed = self._typed.decode(errors="replace").strip(), b""
        if text == "/exit":
            return self._end()
        if text == "/clear":
            self._requests.write(clear=True)
        if text in ("", "/clear"):
            return self._ask()
        self._asking = False
        self._requests.write(say=text)
        return None

    def _end(self) -> None:
        self._asking = False
        if self._open:
            self._open = False
            self._requests.write(end=True)

    def _print(self, text: str) -> None:
        print(text, end="", file=self._screen, flush=True)


def _ending(ended: str) -> str:
    """Why an answer ended, in a line of its own, where it did not end by itself."""
    return f"{_ENDINGS[ended]}\n" if ended in _ENDINGS else ""


def _left_out(counts: dict[str, int]) -> str:
    """What of a prompt did not fit, in a line of its own."""
    parts = []
    if counts["rounds"]:
        parts.append(f"the oldest {counts['rounds']} round{'s' * (counts['rounds'] > 1)}")
    if counts["tokens"]:
        parts.append(f"the first {counts['tokens']} of {counts['tokens'] + counts['ids']} tokens")
    return f"[left out, as it does not fit: {' and '.join(parts)}]\n"
