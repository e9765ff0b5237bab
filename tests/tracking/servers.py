"""A real MLflow server, and what can stand before it: a proxy that breaks in the ways a network can."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bc2exp.launch.line import is_free
from bc2exp.tracking import journal
from bc2exp.tracking import mlflow as tracker

_START_SECONDS = 120
_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "host")


def mlflow_server(folder: Path):
    """`mlflow server` on an sqlite database in `folder`, artifacts too; its address once it answers."""
    store = ("--backend-store-uri", f"sqlite:///{folder}/server.db")
    return served(folder, "server", *store, "--artifacts-destination", str(folder / "artifacts"))


@contextmanager
def served(folder: Path, *words: str, port: int | None = None) -> Iterator[str]:
    """`mlflow` with these words, typed in `folder`, on a free port or this; its address once it answers."""
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]
    # Its runners of language-model jobs would be seven more processes, which nothing here has work for.
    unneeded = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    variables = {**os.environ, **unneeded}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=variables, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_it_answers(f"{address}/health", process, folder / "server.log")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with its worker; nobody needs what it holds
        process.wait()


def _wait_until_it_answers(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
            if answer.status == 200:
                return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class Proxy:
    """Stands before the server at `address`, on a port of its own that never changes.

    `mode` says what happens to a request: "pass" it on; "slow": after `seconds`; "hang": never an answer;
    "error": 500 at once; "lost": it is passed on, but the answer is 500; "late": no answer, and it is passed
    on once `deliver` is called. `asked` lists the requests that came: (mode, method, path).
    """

    def __init__(self, address: str, mode: str = "pass", seconds: float = 0.0) -> None:
        self.mode, self.seconds = mode, seconds
        self.asked: list[tuple[str, str, str]] = []
        self.headers: list[dict[str, str]] = []
        self._upstream = address.removeprefix("http://")
        self._port = free_port()
        self._server: ThreadingHTTPServer | None = None
        self._closed = threading.Event()
        self._late = threading.Event()
        self._waiting: list[threading.Thread] = []
        self.address = f"http://127.0.0.1:{self._port}"

    def open(self) -> Proxy:
        """Listen; before it, and after `away`, connections are refused."""
        self._server = _Listener(("127.0.0.1", self._port), _handler(self))
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def away(self) -> None:
        """Refuse connections; those that hang are dropped."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            self._closed.set()
            self._closed = threading.Event()
            assert is_free(self._port)

    def deliver(self) -> None:
        """Pass on what was kept back, and wait until the server has done it."""
        self._late.set()
        for thread in self._waiting:
            thread.join(60)
        self._waiting, self._late = [], threading.Event()

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list, bytes]:
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def treat(self, method: str, path: str, headers: dict[str, str], body: bytes):
        """The answer to a request; None: none, the connection is dropped."""
        mode, closed = self.mode, self._closed
        self.asked.append((mode, method, path))
        self.headers.append(headers)
        if mode == "hang":
            closed.wait(120)
            return None
        if mode == "late":
            late = self._late

            def pass_on() -> None:
                late.wait(120)
                self.forward(method, path, headers, body)

            self._waiting.append(threading.Thread(target=pass_on, daemon=True))
            self._waiting[-1].start()
            closed.wait(120)
            return None
        if mode == "error":
            return 500, [], b"out of order"
        time.sleep(self.seconds if mode == "slow" else 0)
        answer = self.forward(method, path, headers, body)
        return (500, [], b"out of order") if mode == "lost" else answer


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            answer = proxy.treat(self.command, self.path, headers, body)
            self.close_connection = True
            if answer is None:
                return
            status, named, content = answer
            with suppress(OSError):  # whoever asked may have given up
                self.send_response(status)
                for name, value in named:
                    if name.lower() not in _HOP:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _do

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def all_runs(address: str) -> list:
    """Every run that the tracker holds and nobody deleted."""
    client = tracker.MlflowClient(address)
    experiments = [each.experiment_id for each in client.search_experiments()]
    return client.search_runs(experiments, max_results=1000)


def only_record(address: str, identity: str):
    """The one run of an identity."""
    found = [run for run in all_runs(address) if run.data.tags.get("bc2exp.run") == identity]
    assert len(found) == 1, [run.info.run_id for run in found]
    return found[0]


def history(address: str, run_id: str) -> dict[str, list[tuple[int, str, int]]]:
    """{metric: [(step, value, milliseconds)]}, by step; values as text, in which NaN is equal to itself."""
    client = tracker.MlflowClient(address)
    return {
        name: sorted(
            (point.step, repr(point.value), point.timestamp)
            for point in client.get_metric_history(run_id, name)
        )
        for name in client.get_run(run_id).data.metrics
    }


def models(address: str, record) -> list:
    """The logged models of a run, by name."""
    found = tracker.MlflowClient(address).search_logged_models([record.info.experiment_id])
    return sorted((each for each in found if each.source_run_id == record.info.run_id), key=lambda m: m.name)


def journalled(folder: Path) -> dict[str, list[tuple[int, str, int]]]:
    """The same as the journal has it: the first value of each step."""
    found: dict[str, dict[int, tuple[int, str, int]]] = {}
    for record in journal.read(folder / "metrics.jsonl"):
        for name, value in record.get("metrics", {}).items():
            point = (record["step"], repr(value), round(1000 * record["time"]))
            found.setdefault(name, {}).setdefault(record["step"], point)
    return {name: sorted(points.values()) for name, points in found.items()}
