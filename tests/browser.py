"""A real browser without a window, driven through a pipe by its own protocol: pages as a person sees them.

    with browser() as page:
        page.open("http://127.0.0.1:5000")
        page.wait("document.querySelectorAll('canvas').length > 0")

Only the standard library and an installed Chromium or Chrome; where there is none, `browser` skips the test
and says so.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SECONDS = 90.0
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
)


class PageError(AssertionError):
    """The page did not come to what was waited for."""


class Page:
    """The one tab. `requests` are the addresses it asked for, `errors` what its console complained of."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._heard = b""
        self._number = 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._ask(f"{domain}.enable")

    def size(self, width: int, height: int) -> None:
        """The window's size, in pixels."""
        how = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **how)

    def open(self, address: str) -> None:
        """Go to an address. `requests` and `errors` begin anew, once the page before is gone."""
        self._ask("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.requests.clear()
        self.errors.clear()
        self._ask("Page.navigate", url=address)

    def value(self, code: str) -> Any:
        """What JavaScript comes to in the page."""
        found = self._ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise PageError(json.dumps(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def text(self) -> str:
        """What stands on the page."""
        return str(self.value("document.body ? document.body.innerText : ''"))

    def click(self, element: str) -> None:
        """Click the element that JavaScript comes to, once it is there."""
        self.wait(element)
        self.value(f"{element}.click()")

    def type(self, element: str, text: str) -> None:
        """Write text into the field that JavaScript comes to, once it is there, as its page hears of it."""
        self.wait(element)
        setter = "Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set"
        event = "dispatchEvent(new Event('input', {bubbles: true}))"
        self.value(f"{setter}.call({element}, {json.dumps(text)}); {element}.{event}")

    def wait(self, code: str) -> None:
        """Until JavaScript comes to something true. What it throws, on half a page, is not."""
        deadline = time.monotonic() + _SECONDS
        while not self.value(f"(() => {{ try {{ return !!({code}) }} catch {{ return false }} }})()"):
            if time.monotonic() > deadline:
                raise PageError(f"never true: {code}\n{self.text()[:2000]}\n{self.errors}")
            time.sleep(0.2)

    def shot(self, path: Path) -> None:
        """A picture of the window, as PNG."""
        data = self._ask("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _SECONDS
        while True:
            for answer in self._hear(deadline - time.monotonic()):
                if answer.get("id") == self._number:
                    assert "error" not in answer, f"{method}: {answer['error']}"
                    return answer["result"]
                self._notice(answer)

    def _hear(self, seconds: float) -> list[dict[str, Any]]:
        """The messages that are complete by now; waits for the first."""
        while b"\0" not in self._heard:
            ready, _, _ = select.select([self._back], [], [], max(0.0, seconds))
            data = os.read(self._back, 1 << 16) if ready else b""
            assert data, "the browser does not answer"
            self._heard += data
        message, _, self._heard = self._heard.partition(b"\0")
        return [json.loads(message)]

    def _notice(self, event: dict[str, Any]) -> None:
        about = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(about["exceptionDetails"])[:500])
        elif event.get("method") == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            self.errors.append(json.dumps(about["args"])[:500])
        elif event.get("method") == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(about["entry"]["text"])


@contextmanager
def browser() -> Iterator[Page]:
    """A browser of the test's own, gone at the end; skips where there is none."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed, so no page was looked at")
    flags = [*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    read, to = os.pipe()
    back, write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:

        def connect() -> None:  # it reads 3 and writes 4, whatever our numbers are
            ours, its = os.dup(read), os.dup(write)
            os.dup2(ours, 3)
            os.dup2(its, 4)

        process = subprocess.Popen(
            [program, *flags, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=connect,
            pass_fds=(3, 4),
            start_new_session=True,
        )
        os.close(read)
        os.close(write)
        try:
            yield Page(to, back)
        finally:
            os.close(to)
            os.close(back)
            os.killpg(process.pid, 9)
            process.wait()
