"""A run, seen by the parent of a machine other than node 0: find node 0, start the ranks here, end with it.

It writes nothing into the run folder but the logs of its ranks and of their torchrun.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from bc2exp.config.errors import UserError
from bc2exp.config.load import differences, digest
from bc2exp.config.nodes import Nodes
from bc2exp.launch.folder import refuse_finished
from bc2exp.launch.line import Line
from bc2exp.launch.machine import require
from bc2exp.launch.nodes import NODES_FILE, as_words
from bc2exp.launch.ranks import Failure, Ranks
from bc2exp.launch.run import DONE, FAILED, STOPPED, show, start_ranks
from bc2exp.launch.terminal import StopRequests, lasting_screen, stop_requests

_POLL_SECONDS = 0.1
_CONNECT_SECONDS = 2.0
_ANSWER_SECONDS = 10.0
_TELL_SECONDS = 1.0


def join_run(folder: Path, plain: dict[str, Any], nodes: Nodes, launch_folder: Path) -> int:
    """Do this machine's part of the run that node 0 keeps in `folder`; returns node 0's exit code.

    Raises UserError where node 0 is not found, or runs another configuration.
    """
    if plain["task"].get("resume") == "auto":
        refuse_finished(folder)  # node 0 refuses it as well, and would be waited for in vain
    with stop_requests() as requests, lasting_screen():
        me = f"node {nodes.rank} of {nodes.count}"
        print(f"{me}: waiting for node 0 at {nodes.host}, run {show(folder, launch_folder)}", flush=True)
        line = reach(folder, nodes, requests)
        if line is None:
            print("bc2exp: ended on request, before node 0 was found", file=sys.stderr)
            return FAILED
        problem = _problem(folder, plain, nodes)
        line.send(ready=problem)
        code, text = _follow(line, folder, plain, nodes, requests)
        if problem:
            raise UserError(problem)
        if text:
            print(f"bc2exp: {text}", file=sys.stderr)
        how = {DONE: "done", STOPPED: "stopped, with a checkpoint saved"}.get(code, "failed")
        logs = "" if code in (DONE, STOPPED) else f"; logs are in {show(folder / 'logs', launch_folder)}"
        print(f"{me}: {how}{logs}", flush=True)
    return code


def reach(folder: Path, nodes: Nodes, requests: StopRequests) -> Line | None:
    """The connection to node 0's parent of this start; None where a person stopped the search.

    The record in the folder may be of an earlier start: only a parent that knows its token is node 0.
    """
    deadline = time.monotonic() + nodes.wait_s
    reason = f"{folder / NODES_FILE} is not there"
    while time.monotonic() < deadline:
        if requests.count:
            return None
        try:
            record = json.loads((folder / NODES_FILE).read_text())
        except (OSError, ValueError):
            time.sleep(_POLL_SECONDS)
            continue
        try:
            line = Line(socket.create_connection((nodes.host, record["port"]), _CONNECT_SECONDS))
        except OSError as error:
            reason = f"{nodes.host} did not answer: {error}"
            time.sleep(_POLL_SECONDS)
            continue
        line.send(hello=record["token"], node=nodes.rank)
        answer = _answer(line, requests)
        if answer.get("welcome"):
            if record["nnodes"] != nodes.count:
                line.send(ready=f"launch.nnodes={nodes.count}: it is {record['nnodes']} on node 0")
                raise UserError(f"launch.nnodes={nodes.count}: it is {record['nnodes']} on node 0")
            return line
        line.close()
        if answer.get("refused") not in (None, "stale"):
            raise UserError(answer["refused"])
        reason = f"{folder / NODES_FILE} is of an earlier start"
        time.sleep(_POLL_SECONDS)
    raise UserError(
        f"launch.rdzv_endpoint={nodes.endpoint}: node 0 was not found in {nodes.wait_s:g} s ({reason}); "
        "start the same command there with launch.node_rank=0, and with a hydra.run.dir that both share"
    )


def _answer(line: Line, requests: StopRequests) -> dict[str, Any]:
    deadline = time.monotonic() + _ANSWER_SECONDS
    while time.monotonic() < deadline and not requests.count:
        words = line.receive()
        if words:
            return words[0]
        if line.lost:
            break
        time.sleep(_POLL_SECONDS)
    return {}


def _problem(folder: Path, plain: dict[str, Any], nodes: Nodes) -> str | None:
    """Why this machine cannot take part."""
    try:
        require(plain, nodes)
        record = json.loads((folder / "run.json").read_text())
        if record["digest"] == digest(plain):
            return None
        there = OmegaConf.to_container(OmegaConf.load(folder / "resolved.yaml"))
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"the run folder {folder} cannot be read ({error.strerror}: {error.filename})"
    found = differences(plain, cast(dict[str, Any], there))
    listed = [f"{key}={here} ({other} on node 0)" for key, here, other in found]
    return f"{', '.join(listed)}: the machines of a run need the same command, but for launch.node_rank"


def _follow(
    line: Line, folder: Path, plain: dict[str, Any], nodes: Nodes, requests: StopRequests
) -> tuple[int, str]:
    """Start the ranks when node 0 says so, and end as it says: its exit code, and what there is to tell."""
    ranks: Ranks | None = None
    told, reported = 0, False
    told_of_life = time.monotonic()
    while True:
        if ranks is not None and not reported:
            if not ranks.running():
                ranks.close()
                line.send(ended=as_words(ranks.failure()))
                reported = True
            elif (hung := ranks.hung()) is not None:
                # They end when node 0 says so: until then those of all machines can be asked where they are.
                line.send(ended=as_words(replace(hung, details=ranks.stacks())))
                reported = True
            elif time.monotonic() > told_of_life + _TELL_SECONDS:
                line.send(signs=ranks.signs())
                told_of_life = time.monotonic()
        for word in line.receive():
            if word.get("go") and ranks is None:
                ranks = start_ranks(folder, plain, nodes, line.interface())
            elif word.get("stacks") and ranks is not None and ranks.running() and not reported:
                ranks.stacks()
            elif "end" in word:
                _end(ranks)
                return word["end"], word["text"]
        if line.lost:
            _end(ranks)
            return FAILED, "node 0 was lost: its command was killed, or the machine or the network is gone"
        if requests.count > told:
            told = requests.count
            line.send(stop=told)
            print("asking node 0 to stop after this step" if told == 1 else "ending at once", flush=True)
            if told > 1 and not reported:
                _end(ranks)
                line.send(ended=as_words(Failure("lost", "ended at once on request")))
                reported = True
            if told > 2:
                return FAILED, "ended at once on request, without node 0"
        time.sleep(_POLL_SECONDS)


def _end(ranks: Ranks | None) -> None:
    if ranks is not None:
        ranks.kill()
