"""task=generate as a person types it: on a terminal, through a pipe, from a file."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.commands import BOUND, ROOT, Launch
from tests.small_run import small_words

WORDS = ("task=generate", "task.max_new_tokens=4", "task.temperature=0")


class Terminal:
    """The command on a terminal of the test's own."""

    def __init__(self, folder: Path, *words: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._screen, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bc2exp", *small_words(*words)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=own_terminal,
        )
        os.close(terminal)
        self.seen = ""

    def wait_for(self, text: str, times: int = 1) -> None:
        """Read until a text was shown so often."""
        deadline = time.monotonic() + BOUND
        while self.seen.count(text) < times and self._read():
            assert time.monotonic() < deadline, self.seen
        assert self.seen.count(text) >= times, self.seen

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def end(self) -> int:
        """Everything that is still shown, and the exit code."""
        while self._read():
            pass
        return self.process.wait(BOUND)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._screen], [], [], BOUND)
        assert ready, self.seen
        try:
            data = os.read(self._screen, 4096)
        except OSError:  # nobody is at the other end any more
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)


def own_terminal() -> None:
    """Make standard input the terminal of the new session, so that Ctrl-C typed there reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def answers(folder: Path) -> list[dict]:
    (file,) = folder.glob("runs/generate-tiny_7b/*/answers.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    "ending",
    ["\x04", pytest.param("/exit\n", marks=pytest.mark.slow), pytest.param("\x03", marks=pytest.mark.slow)],
)
def test_a_chat_on_a_terminal(ending: str, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path / "chat", *WORDS)
    terminal.wait_for("a chat: Enter sends")
    terminal.wait_for("> ")
    terminal.type("你好\n")
    terminal.wait_for("> ", 2)
    terminal.type("two\nlines\n")  # pasted at once: one turn
    terminal.wait_for("> ", 3)
    terminal.type("/clear\n")
    terminal.wait_for("> ", 4)
    terminal.type("你好\n")
    terminal.wait_for("> ", 5)
    terminal.type(ending)
    assert terminal.end() == 0, terminal.seen
    first, second, anew = answers(terminal.folder)
    assert [each["prompt"] for each in (first, second, anew)] == ["你好", "two\nlines", "你好"]
    assert first["answer"] == anew["answer"]
    assert first["prompt_tokens"] == anew["prompt_tokens"] < second["prompt_tokens"]
    shown = terminal.seen.replace("\r", "")
    for each in (first, second):
        assert each["answer"].strip() in shown
    assert "3 answers, 12 tokens" in terminal.seen


def test_a_pipe_gives_a_prompt_a_line(launch: Launch) -> None:
    read, write = os.pipe()
    os.write(write, "送餐很快\n\nhello\n".encode())
    os.close(write)
    command = launch.run(*WORDS, stdin=read)
    os.close(read)
    assert command.out.index("> 送餐很快\n") < command.out.index("> hello\n") < command.out.index("done\n")
    found = answers(launch.folder)
    assert [each["prompt"] for each in found] == ["送餐很快", "hello"]
    assert all(each["answer"].strip() in command.out for each in found)
    summary = json.loads((launch.only_run() / "summary.json").read_text())
    assert summary["generation"]["ended"] == {"length": 2}


def test_nothing_to_answer_is_told_before_anything_is_written(launch: Launch) -> None:
    (launch.folder / "empty.txt").write_text("\n\n")
    (launch.folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    for words, said in {
        (): "standard input: holds no prompt",
        ("task.file=empty.txt",): "empty.txt: holds no prompt",
        ("task.file=latin.txt",): "latin.txt: is not UTF-8",
        ("-m", "task.top_k=1,2"): "a sweep needs its prompts named",
    }.items():
        command = launch.run(*WORDS, *words, code=2)
        assert said in command.err, words
    assert launch.runs() == []
