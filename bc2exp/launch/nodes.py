"""The machines of a run, seen from node 0: they come, start together, stop together and end together.

Each machine has a parent of its own. Node 0's listens on a port that it writes into the run folder, with a
token of this very start: a record that an earlier start left behind leads nowhere, or to a parent that does
not know the token. The connection then carries every word between the parents (`Line`):

    node k: hello (token, node), ready (problem), signs (of life), stop (how often), ended (failure)
    node 0: welcome or refused, go, stacks (leave them in the logs), end (code, text)
"""

from __future__ import annotations

import select
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bc2exp.config.nodes import Nodes
from bc2exp.launch.line import Line, listen
from bc2exp.launch.ranks import Failure
from bc2exp.storage.atomic import write_json

NODES_FILE = "nodes.json"
"""Node 0's record of a start: token and port. There while that start lives, or was killed."""

GRACE_SECONDS = 5.0
"""How long machines that lost a peer may take to end on their own and say why, before they are ended."""

_POLL_SECONDS = 0.1


class Alone:
    """The other machines of a run on one machine: none."""

    stops = 0
    interface: str | None = None

    def gather(self, give_up: Callable[[], bool]) -> Failure | None:
        """Nobody is waited for."""
        return None

    def go(self) -> None:
        """Nobody is told."""

    def signs(self) -> list[dict[str, Any]]:
        """There are no ranks elsewhere."""
        return []

    def hung(self) -> Failure | None:
        """Nobody hangs elsewhere."""
        return None

    def ask_for_stacks(self) -> None:
        """Nobody is asked."""

    def overdue(self) -> bool:
        """Nobody is lost."""
        return False

    def settle(self, own: Failure | None) -> Failure | None:
        """This machine's own word."""
        return own

    def end(self, code: int, text: str) -> None:
        """Nobody is told."""


class Others:
    """The other machines of a run on several.

    Attributes:
        stops: how often any one machine was asked to stop.
        interface: the network interface that leads to the other machines; None where unknown.
    """

    def __init__(self, folder: Path, nodes: Nodes) -> None:
        self.stops = 0
        self.interface: str | None = None
        self._nodes = nodes
        self._token = uuid.uuid4().hex
        self._record = folder / NODES_FILE
        self._listener = listen()
        self._callers: list[Line] = []
        self._lines: dict[int, Line] = {}
        self._ready: set[int] = set()
        self._ended: dict[int, Failure | None] = {}
        self._signs: list[dict[str, Any]] = []
        self._refusal: Failure | None = None
        self._deadline: float | None = None
        record = {"token": self._token, "port": self._listener.getsockname()[1], "nnodes": nodes.count}
        write_json(self._record, record)

    def gather(self, give_up: Callable[[], bool]) -> Failure | None:
        """Wait until every machine is ready; the failure where that cannot be any more."""
        deadline = time.monotonic() + self._nodes.wait_s
        while missing := sorted(set(range(1, self._nodes.count)) - self._ready):
            self._answer_callers()
            self._hear()
            failure = self._refusal or self._first_failure(None)
            if failure is not None:
                return failure
            if give_up():
                return Failure("lost", "ended on request, before the other nodes had come")
            if time.monotonic() > deadline:
                names = ", ".join(map(str, missing))
                return Failure(
                    "user",
                    f"launch.nnodes={self._nodes.count}: node {names} did not come within "
                    f"{self._nodes.wait_s:g} s; start the same command there with its own launch.node_rank, "
                    f"and with this hydra.run.dir, which every node must reach: {self._record.parent}",
                )
            time.sleep(_POLL_SECONDS)
        self.interface = self._lines[1].interface()
        return None

    def go(self) -> None:
        """Let every machine start its ranks."""
        for line in self._lines.values():
            line.send(go=True)

    def signs(self) -> list[dict[str, Any]]:
        """What was told since the last call of the ranks of other machines: their last signs of life."""
        told, self._signs = self._signs, []
        return told

    def hung(self) -> Failure | None:
        """The failure of a machine on which a rank hangs, and whose ranks still live."""
        return next((failure for failure in self._ended.values() if failure and failure.kind == "hung"), None)

    def ask_for_stacks(self) -> None:
        """Let every machine leave the stacks of its ranks in the logs, before they end."""
        for line in self._lines.values():
            line.send(stacks=True)

    def overdue(self) -> bool:
        """Whether a machine has failed for so long that the ranks here should have ended by themselves."""
        self._answer_callers()
        self._hear()
        if self._first_failure(None) is None:
            return False
        self._deadline = self._deadline or time.monotonic() + GRACE_SECONDS
        return time.monotonic() > self._deadline

    def settle(self, own: Failure | None) -> Failure | None:
        """Why the run failed, by the word of all machines; None where none has failed.

        Waits a moment for what the others have to say: whoever lost a rank knows better than whoever lost
        the connection to it.
        """
        deadline = time.monotonic() + (GRACE_SECONDS if own else 4 * GRACE_SECONDS)
        while len(self._ended) < len(self._lines) and time.monotonic() < deadline:
            self._hear()
            time.sleep(_POLL_SECONDS)
        return self._first_failure(own)

    def end(self, code: int, text: str) -> None:
        """Tell every machine how the run ended, and hang up."""
        self._hear()  # a connection closed with words unheard would take back what was said last
        for line in [*self._lines.values(), *self._callers]:
            line.send(end=code, text=text)
            line.close()
        self._listener.close()
        self._record.unlink(missing_ok=True)

    def _answer_callers(self) -> None:
        while select.select([self._listener], [], [], 0)[0]:
            self._callers.append(Line(self._listener.accept()[0]))
        for caller in list(self._callers):
            words = caller.receive()
            if words or caller.lost:
                self._callers.remove(caller)
            if words:
                self._welcome(caller, words[0])

    def _welcome(self, caller: Line, hello: dict[str, Any]) -> None:
        node = hello.get("node")
        if hello.get("hello") != self._token or not isinstance(node, int) or not 0 < node < self._nodes.count:
            caller.send(refused="stale")
            caller.close()
        elif node in self._lines:
            text = f"launch.node_rank={node}: two machines have this number; each needs its own"
            self._refusal = Failure("user", text)
            caller.send(refused=text)
            caller.close()
        else:
            self._lines[node] = caller
            caller.send(welcome=True)

    def _hear(self) -> None:
        for node, line in self._lines.items():
            for word in line.receive():
                if "ready" in word and word["ready"] is None:
                    self._ready.add(node)
                elif "ready" in word:
                    self._ended[node] = Failure("user", f"node {node}: {word['ready']}")
                elif "signs" in word:
                    self._signs += word["signs"]
                elif "stop" in word:
                    self.stops = max(self.stops, int(word["stop"]))
                elif "ended" in word:
                    self._ended[node] = Failure(**word["ended"]) if word["ended"] else None
            if line.lost and node not in self._ended:
                text = f"node {node} was lost: its command was killed, or the machine or the network is gone"
                self._ended[node] = Failure("lost", text)

    def _first_failure(self, own: Failure | None) -> Failure | None:
        """What was killed from outside or hangs comes first, then the first error in time."""
        failures = [failure for failure in (own, *self._ended.values()) if failure is not None]
        causes = ("lost", "hung")
        return min(failures, key=lambda failure: (failure.kind not in causes, failure.time), default=None)


def as_words(failure: Failure | None) -> dict[str, Any] | None:
    """A failure as a machine tells it to node 0."""
    return asdict(failure) if failure else None
