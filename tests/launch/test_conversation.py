"""The terminal's side of a generation, without ranks: who is asked what, and in which order it is shown."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from bc2exp.config.nodes import find_nodes
from bc2exp.launch.conversation import Chat, NoConversation, Prompts, converse
from bc2exp.tracking.talk import STREAM, Lines
from tests.small_run import small_plain


class Keyboard(io.StringIO):
    """Somebody at a terminal."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 0


def plain(folder: Path, *words: str) -> dict:
    return small_plain(folder, *words)


def test_answers_are_shown_in_order_whoever_is_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two copies, each with its stream: the second prompt is answered first."""
    talk = Prompts(["one", "two", "three"])
    talk.begin(tmp_path)
    asked = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert asked == [{"prompt": "one"}, {"prompt": "two"}, {"prompt": "three"}, {"end": True}]
    first, second = (Lines(tmp_path / STREAM.format(copy=copy)) for copy in (0, 1))
    second.write(number=1, text="B")
    second.write(number=1, ended="length")
    talk.tend(stop=False)
    assert capsys.readouterr().out == ""
    first.write(number=0, text="A")
    talk.tend(stop=False)
    assert capsys.readouterr().out == "> one\nA"
    first.write(number=0, text="a")
    first.write(number=0, ended="eos")
    first.write(number=2, left_out={"ids": 3, "rounds": 0, "tokens": 2})
    talk.tend(stop=False)
    shown = capsys.readouterr().out
    assert shown.startswith(
        "a\n\n> two\nB\n[as long as task.max_new_tokens or task.context allows]\n\n> three\n"
    )
    assert shown.endswith("[left out, as it does not fit: the first 2 of 5 tokens]\n")
    first.write(number=2, ended="stopped")
    talk.tend(stop=True)
    assert "[stopped]" in capsys.readouterr().out


def test_requests_of_an_earlier_start_are_forgotten(tmp_path: Path) -> None:
    for name in ("requests.jsonl", "stream-0.jsonl", "stream-1.jsonl"):
        (tmp_path / name).write_text('{"prompt": "old"}\n')
    Prompts(["new"]).begin(tmp_path)
    assert "old" not in (tmp_path / "requests.jsonl").read_text()
    assert not list(tmp_path.glob("stream-*"))


def test_who_is_talked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = find_nodes(plain(tmp_path, "task=generate"))
    monkeypatch.setattr("sys.stdin", Keyboard())
    assert isinstance(converse(plain(tmp_path), alone), NoConversation)
    assert isinstance(converse(plain(tmp_path, "task=generate"), alone), Chat)
    assert isinstance(converse(plain(tmp_path, "task=generate", "task.prompt=a"), alone), Prompts)
    with pytest.raises(UserError, match=r"task\.format=plain: a chat has turns"):
        converse(plain(tmp_path, "task=generate", "task.format=plain"), alone)


def test_a_chat_is_held_on_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "task=generate",
        "hardware=2cpu",
        "launch.nnodes=2",
        "launch.node_rank=0",
        "launch.rdzv_endpoint=localhost:29511",
        f"hydra.run.dir={tmp_path}/run",
    )
    several = plain(tmp_path, *words)
    monkeypatch.setattr("sys.stdin", Keyboard())
    with pytest.raises(UserError, match=r"launch\.nnodes=2: a chat is held on one machine"):
        converse(several, find_nodes(several))
    several["task"]["prompt"] = "a"
    assert isinstance(converse(several, find_nodes(several)), Prompts)
