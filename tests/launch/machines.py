"""Two machines on one: network and host name of their own (Linux namespaces), a cable between them.

Needs root. They share processes and files, as machines of a cluster share a file system.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.launch.commands import Command, Launch

NAMES = ("zulu", "alpha")
"""Host names of node 0 and node 1: where a meeting sorts by name, rank 0 lands on the wrong one."""


def missing() -> str:
    """Why this host cannot play two machines; empty where it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare"))):
        return "two machines: needs Linux, root, ip and unshare"
    name = f"bc2exp-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    if tried.returncode:
        return f"two machines: network namespaces are not permitted here ({tried.stderr.strip()})"
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Machines:
    """Two machines with a cable; `close` takes them away.

    Attributes:
        number: tells them from others on this host.
        folder: for a file of theirs.
    """

    number: int
    folder: Path

    @property
    def _spaces(self) -> tuple[str, str]:
        return f"bc2exp-{os.getpid()}-{self.number}-0", f"bc2exp-{os.getpid()}-{self.number}-1"

    @property
    def _hosts(self) -> Path:
        return self.folder / f"hosts-{self.number}"

    @property
    def endpoint(self) -> str:
        """Where the ranks meet: an address of node 0, which the machines know as `node0`, too."""
        return "10.77.0.1:29500"

    def open(self) -> Machines:
        """Make them."""
        one, two = self._spaces
        # Not the host names: what a machine calls itself need not lead anywhere.
        self._hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n")
        for space in (one, two):
            _ip("netns", "add", space)
        _ip("-n", one, "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", two)
        for number, space in enumerate((one, two)):
            _ip("-n", space, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"cable{number}")
            for device in ("lo", f"cable{number}"):
                _ip("-n", space, "link", "set", device, "up")
        return self

    def cut(self) -> None:
        """Pull the cable out of node 1."""
        _ip("-n", self._spaces[1], "link", "set", "cable1", "down")

    def on(self, node: int) -> list[str]:
        """The words before a command that run it on a machine; all of them give way to it (exec)."""
        # `ip netns exec` gives the command mounts of its own, so the file is theirs alone.
        change = f'mount --bind {self._hosts} /etc/hosts; hostname {NAMES[node]}; exec "$@"'
        return ["ip", "netns", "exec", self._spaces[node], "unshare", "--uts", "sh", "-c", change, "sh"]

    def start(self, launch: Launch, node: int, *words: str, inject: str = "") -> Command:
        """Type the command of a machine."""
        where = (f"launch.node_rank={node}", f"launch.rdzv_endpoint={self.endpoint}", "launch.nnodes=2")
        folder = f"hydra.run.dir={launch.folder}/runs/two/machines"
        return launch.start(*words, *where, folder, inject=inject, machine=self.on(node))

    def close(self) -> None:
        """Take them away; the cable goes with them."""
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
