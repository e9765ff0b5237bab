"""Passwords and keys stay where the person put them: in no record, log, message or traceback.

An address may bear a name and a password, `http://me:word@host`. The door takes them out before anything is
written (`withdraw`); the process that speaks to the tracker gets the whole address in its environment. What
is printed passes through `hide`, as other programs put addresses into their messages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TextIO, cast
from urllib.parse import parse_qsl, unquote, urlencode

ADDRESS = "MLFLOW_TRACKING_URI"
"""The variable with the tracker's address; the tracker's process finds it whole there."""

_KEY = "tracking.uri"
_VARIABLE = re.compile(
    r"(^|_)(token|secret|passphrase)(_|$)|password|passwd|_pwd$|(api|access|private|secret|auth)_?key", re.I
)
_PLACE_OF_ONE = re.compile(r"_(file|path|dir)$", re.I)
_FIELD = re.compile(r"token|passw|pwd|secret|credential|odbc_connect|api_?key|access_?key", re.I)
_SHORTEST = 6
"""A shorter value is too likely to be a word of the text itself."""

# Up to the last @ before the path: a password that nobody quoted may hold one.
_USERINFO = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)[^\s/?#\"'<>]*@")
_QUERY = re.compile(r"(?P<name>[?&](?P<key>[\w.-]+)=)[^&\s\"'<>#]+")

_whole: dict[str, str] = {}


def bare(uri: str) -> str:
    """An address without name and password, and without the fields of its query that hold secrets."""
    scheme, found, rest = uri.partition("://")
    if not found:
        return uri
    place = re.match(r"[^/?#]*", rest)
    assert place is not None
    path, mark, query = rest[place.end() :].partition("?")
    fields = parse_qsl(query, keep_blank_values=True)
    kept = [(name, value) for name, value in fields if not _FIELD.search(name)]
    if len(kept) < len(fields):
        mark, query = "?" if kept else "", urlencode(kept)
    return f"{scheme}://{place[0].rpartition('@')[2]}{path}{mark}{query}"


def withdraw(uri: str) -> str:
    """The bare address. The whole one is kept in this process, for `whole`."""
    address = bare(uri)
    if address != uri:
        _whole[address] = uri
    return address


def withdraw_from(words: list[str]) -> list[str]:
    """The words of a command line, with the tracker's address bare."""
    return [_withdraw_from(word) for word in words]


def _withdraw_from(word: str) -> str:
    key, equals, value = word.partition("=")
    if key.lstrip("+") != _KEY or "://" not in value:
        return word
    parts = value.split(",")
    if not all("://" in part for part in parts):  # a comma of the password, and not of a sweep
        parts = [value]
    return f"{key}{equals}{','.join(_in_quotes(part) for part in parts)}"


def _in_quotes(text: str) -> str:
    quote = text[0] if text[0] in "\"'" and text.endswith(text[0]) else ""
    return f"{quote}{withdraw(text.strip(quote) if quote else text)}{quote}"


def whole(address: str, environment: Mapping[str, str] = os.environ) -> str:
    """The address that became bare: the one in the environment, or the one withdrawn; else `address`."""
    outside = environment.get(ADDRESS, "")
    return outside if bare(outside) == address else _whole.get(address, address)


def hide(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` with `***` for the userinfo of addresses, their secret fields, and the values of variables that
    hold secrets."""
    text = _USERINFO.sub(r"\g<scheme>***@", text)
    text = _QUERY.sub(lambda found: f"{found['name']}***" if _FIELD.search(found["key"]) else found[0], text)
    for value in _values(environment):
        text = text.replace(value, "***")
    return text


def secret_in(text: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The name of a variable whose secret value is in `text`; None where there is none."""
    return next((name for value, name in _values(environment).items() if value in text), None)


def _values(environment: Mapping[str, str]) -> dict[str, str]:
    """{secret: the variable that holds it}."""
    found = {
        value: name
        for name, value in environment.items()
        if _VARIABLE.search(name) and not _PLACE_OF_ONE.search(name)
    }
    for uri in (environment.get(ADDRESS, ""), *_whole.values()):
        userinfo = uri.partition("://")[2].split("/")[0].rpartition("@")[0]
        password = userinfo.partition(":")[2]
        found |= {password: ADDRESS, unquote(password): ADDRESS}
    return {value: name for value, name in found.items() if len(value) >= _SHORTEST}


class Hiding:
    """A text stream that hides secrets; in all else the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` without its secrets."""
        self._stream.write(hide(text))
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def hiding(stream: TextIO) -> TextIO:
    """The stream, with its secrets hidden; one that was closed before the start is None, and stays it."""
    return cast(TextIO, Hiding(stream)) if stream is not None else stream
