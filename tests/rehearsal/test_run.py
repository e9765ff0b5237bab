"""The command with `hardware.rehearsal=true`: the same losses as on the CPU, labels, counts, and failures."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from tests.hardware import npu_device
from tests.launch.commands import Launch, events, records, values, wait_for

npu_device.require()

STEPS = 3


def training(steps: int = STEPS) -> tuple[str, ...]:
    """Of 2 layers; where every rank has all samples, 2 micro batches a step."""
    return ("model.num_heads=8", "hardware.precision=fp32", f"task.steps={steps}", "task.micro_batch=4")


REHEARSED = ("hardware.rehearsal=true", "model=tiny_7b")

_AFTER_ACTIVATION = """
from bc2exp.hardware import rehearsal
install = rehearsal._install
def installed():
    install()
    import torch, torch_npu
    from bc2exp.train.trainer import Trainer
    record = Trainer._record
    def replaced(self, step, values):
        {what}
        record(self, step, values)
    Trainer._record = replaced
rehearsal._install = installed
"""


def in_a_step(what: str) -> str:
    """To inject: Python that a rank runs when it records a step, with the devices there."""
    return _AFTER_ACTIVATION.format(what=what)


@pytest.fixture
def launch(tmp_path):
    made = Launch(tmp_path / "launch")
    yield made
    made.close()


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The launch folder, the command and the run folder of a rehearsal on 8 devices."""
    made = Launch(tmp_path_factory.mktemp("eight") / "launch")
    command = made.run("hardware=8npu", *REHEARSED, *training(), "tracking.enabled=true")
    yield made, command, made.only_run()
    made.close()


def calls(counted: dict, name: str, phase: str = "train") -> int:
    found = counted["operators"][name]
    assert sum(found["phases"].values()) == found["calls"]
    return found["phases"].get(phase, 0)


def assert_counts(counted: dict, *, layers: int, micro_batches: int, steps: int, times_forward: int) -> None:
    """The fused operators of a training in fp32 on one data rank, of which full recomputation repeats the
    layers' forward pass. The optimizer has two groups of weights: one with decay and one without."""
    passes = micro_batches * steps
    assert calls(counted, "npu::npu_fusion_attention") == layers * passes * times_forward
    assert calls(counted, "npu::npu_fusion_attention_grad") == layers * passes
    assert calls(counted, "npu::npu_swiglu") == layers * passes * times_forward
    assert calls(counted, "npu::npu_swiglu_backward") == layers * passes
    assert calls(counted, "npu::npu_rms_norm") == (2 * layers * times_forward + 1) * passes
    assert calls(counted, "npu::npu_rms_norm_backward") == (2 * layers + 1) * passes
    # queries and keys, and backward turns both back by the same operator
    assert calls(counted, "npu::npu_rotary_mul") == layers * passes * 2 * (times_forward + 1)
    assert calls(counted, "aten::_fused_adamw_") == 2 * steps
    assert counted["cpu_fallbacks"] == {}
    assert counted["refused_operators"] == []


def test_recomputation_repeats_the_forward_pass_and_nothing_else(launch):
    launch.run("hardware=1npu", *REHEARSED, *training(), "parallelism.recompute=full")
    counted = json.loads((launch.only_run() / "rehearsal.json").read_text())
    assert_counts(counted, layers=2, micro_batches=2, steps=STEPS, times_forward=2)


def test_an_operator_that_is_switched_off_is_not_called(launch):
    off = [f"hardware.fused_{name}=false" for name in ("attention", "rms_norm", "swiglu", "rotary")]
    launch.run("hardware=1npu", *REHEARSED, *training(1), *off)
    counted = json.loads((launch.only_run() / "rehearsal.json").read_text())
    assert [name for name in counted["operators"] if name.startswith("npu::")] == []


def test_losses_are_those_of_the_cpu(eight, launch):
    launch.run("hardware=cpu", "parallelism=single", *training())
    for metric in ("train/loss", "train/grad_norm", "eval/loss"):
        here, there = values(launch.only_run(), metric), values(eight[2], metric)
        assert list(there) == list(here)
        assert list(there.values()) == pytest.approx(list(here.values()), abs=1e-5)


def test_it_says_everywhere_what_it_is_and_nowhere_how_fast(eight):
    made, command, run = eight
    assert command.out.splitlines()[0].startswith("rehearsal on host memory")
    assert "rehearsal: speed not measured" in command.out
    assert "tokens/s" not in command.out
    assert "rehearsal: true" in (run / "resolved.yaml").read_text()
    (event,) = events(run, "rehearsal")
    assert event["devices"] == 8
    assert event["memory_bytes"] == 64 * 2**30
    named = {name for record in records(run) for name in record.get("metrics", {})}
    assert "rehearsal/step_time_s" in named
    assert not [name for name in named if name.startswith("perf/")]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rehearsal"] is True
    speed = summary["throughput"]
    assert {speed[key] for key in ("samples_per_s", "tokens_per_s_per_device", "s_per_step", "mfu")} == {None}
    assert json.loads((run / "run.json").read_text())["tags"]["bc2exp.rehearsal"] == "true"
    with sqlite3.connect(made.folder / "mlflow.db") as tracker:
        assert ("bc2exp.rehearsal", "true") in tracker.execute("select key, value from tags").fetchall()
        tracked = {name for (name,) in tracker.execute("select key from metrics")}
    assert "train/loss" in tracked
    assert not [name for name in tracked if name.startswith("perf/")]


def test_the_count_is_that_of_the_layers_and_steps(eight):
    counted = json.loads((eight[2] / "rehearsal.json").read_text())
    assert counted["ranks"] == 8
    assert counted["cpu_fallbacks"] == {}
    assert counted["refused_operators"] == []
    assert counted["ranks_without_a_count"] == []
    assert counted["ranks_that_differ"] == {}
    assert_counts(counted, layers=2, micro_batches=2, steps=STEPS, times_forward=1)
    evaluated = calls(counted, "npu::npu_fusion_attention", "evaluate")
    assert evaluated > 0
    assert calls(counted, "npu::npu_fusion_attention_grad", "evaluate") == 0
    assert calls(counted, "npu::npu_rms_norm", "evaluate") * 2 == evaluated * 5
    sizes = counted["collectives"]["all_reduce"]["tensors"]
    assert {each["ranks"] for each in sizes} == {8}
    assert all(bytes > 0 for bytes in counted["peak_memory_bytes"])


def test_a_refused_operator_is_named_in_the_error_and_in_the_count(launch):
    code = in_a_step('torch_npu.npu_gelu(torch.ones(4, device="npu"))')
    command = launch.run("hardware=1npu", *REHEARSED, *training(), inject=code, code=1)
    assert "the rehearsal refuses npu::npu_gelu" in command.err
    counted = json.loads((launch.only_run() / "rehearsal.json").read_text())
    (refusal,) = counted["refused_operators"]
    assert (refusal["operator"], refusal["rank"], refusal["calls"]) == ("npu::npu_gelu", 0, 1)


def test_a_tensor_for_another_device_is_refused(launch):
    command = launch.run(
        "hardware=1npu", *REHEARSED, *training(), inject=in_a_step("torch.ones(2).cuda()"), code=1
    )
    assert "CUDA" in command.err


def test_too_little_memory_is_a_real_error(launch):
    command = launch.run("hardware=1npu", "hardware.memory_gib=0.004", *REHEARSED, *training(), code=1)
    assert "out of memory" in command.err.lower()


def shared_memory() -> set[str]:
    """The shared memory that has a name; folders are of other programs, such as servers of MLflow."""
    return {entry.name for entry in Path("/dev/shm").iterdir() if not entry.is_dir()}


def test_a_killed_rank_ends_the_others_and_leaves_nothing(launch):
    before = shared_memory()
    code = in_a_step("import time; time.sleep(1)")
    words = ("hardware=8npu", "hardware.num_devices=2", "parallelism=tp", *REHEARSED, *training(100))
    command = launch.start(*words, inject=code)

    def trains() -> bool:
        assert command.process.poll() is None, command.err
        return bool(launch.runs() and values(launch.only_run(), "train/loss"))

    wait_for(trains, "a step")
    began = time.monotonic()
    os.kill(launch.rank(1), signal.SIGKILL)
    assert command.wait() == 1
    command.nothing_left()
    assert time.monotonic() - began < 30
    assert shared_memory() <= before
    counted = json.loads(Path(launch.only_run() / "rehearsal.json").read_text())
    assert 1 in counted["ranks_without_a_count"]
