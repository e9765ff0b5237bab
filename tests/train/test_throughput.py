"""The published columns, on a clock of the test's own."""

from __future__ import annotations

import pytest

from bc2exp.train import throughput
from bc2exp.train.throughput import Throughput, flops_per_token


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def make(peak_tflops=None, **changes):
    parts = {
        "global_batch": 32,
        "sequence_length": 4096,
        "num_devices": 8,
        "flops_per_token": 45.2e9,
        "peak_tflops": peak_tflops,
    }
    made = Throughput(**{**parts, **changes})
    made.restart()
    return made


def test_the_flops_of_7b_are_those_of_the_recipe():
    flops = flops_per_token(
        num_parameters=7_505_973_248,
        vocab_size=125_696,
        hidden_size=4096,
        num_layers=32,
        sequence_length=4096,
    )
    assert flops == pytest.approx(45.2e9, abs=0.05e9)


def test_columns_and_their_identities(clock):
    measure = make()
    for _ in range(4):
        clock.now += 14.0
        measure.count_step()
    values = measure.measure()
    assert values["perf/step_time_s"] == pytest.approx(14.0)
    assert values["perf/samples_per_s"] == pytest.approx(32 / 14)
    assert values["perf/tokens_per_s_per_device"] == pytest.approx(32 * 4096 / 14 / 8)
    assert set(values) == {"perf/step_time_s", "perf/samples_per_s", "perf/tokens_per_s_per_device"}


def test_each_measure_is_of_the_steps_since_the_last(clock):
    measure = make()
    for seconds in (5.0, 2.0):
        clock.now += seconds
        measure.count_step()
        assert measure.measure()["perf/step_time_s"] == pytest.approx(seconds)


def test_a_restart_leaves_out_what_was_no_step(clock):
    measure = make()
    clock.now += 100.0
    measure.restart()
    clock.now += 2.0
    measure.count_step()
    assert measure.measure()["perf/step_time_s"] == pytest.approx(2.0)


def test_mfu_is_the_used_part_of_a_named_peak(clock):
    measure = make(peak_tflops=313.0)
    clock.now += 14.0
    measure.count_step()
    # 1170 tokens a second a device, 45.2 GFLOP each, of 313 TFLOP/s
    assert measure.measure()["perf/mfu"] == pytest.approx(32 * 4096 / 14 / 8 * 45.2e9 / 313e12)


def test_a_rehearsal_measures_no_throughput() -> None:
    speed = Throughput(
        global_batch=4,
        sequence_length=8,
        num_devices=2,
        flops_per_token=1.0,
        peak_tflops=1.0,
        rehearsal=True,
    )
    speed.count_step()
    assert list(speed.measure()) == ["rehearsal/step_time_s"]
