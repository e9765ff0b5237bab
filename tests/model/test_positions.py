"""Slopes, rotary tables, positions in packed rows."""

from __future__ import annotations

import pytest
import torch

from bc2exp.model.positions import alibi_slopes, rope_tables, segment_positions


def test_slopes_of_a_power_of_two():
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))


def test_slopes_of_the_13b():
    expected = [2 ** (-8 * i / 32) for i in range(1, 33)] + [2 ** (-8 * j / 64) for j in range(1, 16, 2)]
    torch.testing.assert_close(alibi_slopes(40), torch.tensor(expected))
    assert alibi_slopes(40).dtype == torch.float32


@pytest.mark.parametrize(("num_heads", "extra"), [(1, 0), (5, 1), (6, 2), (7, 3), (12, 4), (24, 8)])
def test_other_counts_extend_the_power_of_two_below(num_heads, extra):
    slopes, below = alibi_slopes(num_heads), num_heads - extra
    torch.testing.assert_close(slopes[:below], alibi_slopes(below))
    torch.testing.assert_close(slopes[below:], alibi_slopes(2 * below)[0 : 2 * extra : 2])


def test_rope_tables_repeat_the_angles_of_the_first_half():
    cos, sin = rope_tables(torch.tensor([[0, 3]]), 4, 100.0)
    assert cos.shape == (1, 2, 4)
    angles = torch.tensor([3.0, 3.0 / 10.0, 3.0, 3.0 / 10.0])
    torch.testing.assert_close(cos, torch.stack((torch.ones(4), angles.cos()))[None])
    torch.testing.assert_close(sin, torch.stack((torch.zeros(4), angles.sin()))[None])


def test_positions_restart_in_every_segment():
    ids = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5], [1, 2, 1, 1, 0, 1, 1, 2]])
    expected = torch.tensor([[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 1, 0, 0, 1, 0]])
    assert torch.equal(segment_positions(ids), expected)
