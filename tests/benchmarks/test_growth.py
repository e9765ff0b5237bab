"""The trend of a growing work: a cliff is seen, a steady change is none. Nothing is timed."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import growth  # noqa: E402

WORKS = growth.AXES["sequence"]


def rates(exponent: float, noise: float = 0.0) -> dict[int, float]:
    generator = random.Random(0)
    return {work: 1e6 * work**exponent * (1 + noise * generator.uniform(-1, 1)) for work in WORKS}


def test_the_line_through_two_points_holds_between_them_and_at_their_ends():
    left, right = (10, 100.0), (1000, 400.0)
    assert growth.expected(100, left, right) == pytest.approx(200.0)
    assert growth.expected(10, left, right) == pytest.approx(100.0)
    assert growth.expected(1000, left, right) == pytest.approx(400.0)


@pytest.mark.parametrize("exponent", [-0.6, 0.0, 0.3])
def test_a_power_has_its_exponent_and_no_point_off_the_trend(exponent):
    assert growth.slope(rates(exponent)) == pytest.approx(1 - exponent)
    assert growth.worst(rates(exponent))[1] == pytest.approx(1.0)


@pytest.mark.parametrize("axis", growth.AXES)
def test_works_that_do_not_double_have_the_same_trend(axis):
    powers = {work: 7.0 * work**-0.25 for work in growth.AXES[axis]}
    assert growth.worst(powers)[1] == pytest.approx(1.0)


@pytest.mark.parametrize("work", WORKS[1:-1])
def test_a_seeded_dip_is_found_where_it_is(work):
    dipped = rates(-0.2, noise=0.03)
    dipped[work] *= 0.6
    found, part = growth.worst(dipped)
    assert found == work
    assert part == pytest.approx(0.6, abs=0.05)


def test_noise_alone_is_no_cliff():
    assert growth.worst(rates(-0.2, noise=0.03))[1] > 0.9


def test_an_axis_gives_two_figures_and_a_row_a_point():
    measured = {"sequence": {work: [rate, 2 * rate, 0.5 * rate] for work, rate in rates(-0.5).items()}}
    exponent, least = growth.ratios(measured)
    assert exponent["value"] == pytest.approx(1.5)
    assert (least["value"], least["target"]) == (pytest.approx(1.0), 0.8)
    head, *rows = growth.points(measured)
    assert [len(row) for row in rows] == [len(head)] * len(WORKS)
    assert rows[0] == ["sequence", "512", "1.00"]
    assert rows[2] == ["sequence", "2,048", "0.50"]
