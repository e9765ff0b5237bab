"""A connection between the parents of two machines: JSON objects, a line each.

Its end is the other parent's end, however that ended: the kernel closes the connection of a killed process,
and where a whole machine or the network is gone, the kernel's own probes find out.
"""

from __future__ import annotations

import fcntl
import json
import select
import socket
import struct
import sys
from typing import Any

_SEND_SECONDS = 5.0
_IDLE_SECONDS, _PROBE_SECONDS, _NUM_PROBES = 5, 3, 3
"""A peer that does not answer for the first plus the product of the others counts as gone: 14 s."""

_SIOCGIFADDR = 0x8915
_MAPPED = "::ffff:"


class Line:
    """One end of a connection. Nothing here waits for the peer; `lost` says that it is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self.lost = False
        self._connection = connection
        self._heard = b""
        connection.settimeout(_SEND_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            gone_ms = 1000 * (_IDLE_SECONDS + _PROBE_SECONDS * _NUM_PROBES)
            for option, value in (
                (socket.TCP_KEEPIDLE, _IDLE_SECONDS),
                (socket.TCP_KEEPINTVL, _PROBE_SECONDS),
                (socket.TCP_KEEPCNT, _NUM_PROBES),
                (socket.TCP_USER_TIMEOUT, gone_ms),
            ):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, **message: Any) -> None:
        """Send one object. What a lost peer does not get is no error here."""
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.lost = True

    def receive(self) -> list[dict[str, Any]]:
        """The objects that have come since the last call. A peer that speaks otherwise counts as lost."""
        while not self.lost and select.select([self._connection], [], [], 0)[0]:
            try:
                data = self._connection.recv(1 << 16)
            except OSError:
                data = b""
            self._heard += data
            self.lost = not data
        *lines, self._heard = self._heard.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if not all(isinstance(message, dict) for message in messages):
            self.lost = True
            return []
        return messages

    def interface(self) -> str | None:
        """The network interface of this machine that the connection goes through; None where unknown."""
        try:
            return interface_of(self._connection.getsockname()[0])
        except OSError:
            return None

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def listen() -> socket.socket:
    """A listening socket on a free port of every address of this machine."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def is_free(port: int) -> bool:
    """Whether a server may listen on a port of this machine."""
    try:
        with socket.create_server(("", port)):
            return True
    except OSError:
        return False


def interface_of(address: str) -> str | None:
    """The interface that has an IPv4 address of this machine; None where none is found."""
    address = address.removeprefix(_MAPPED)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # an interface without an address
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None
