"""Where a token stands: ALiBi slopes (13B), rotary tables (7B), positions inside packed segments.

Everything is computed from its arguments on every call. The tables are small beside the hidden
states, and a buffer would be lost when a model built on the meta device is given storage.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """The bias slope of every head, fp32 [num_heads].

    For n = 2^k heads slope i is 2^(-8i/n), i = 1..n (Press et al. 2022, "Train Short, Test Long").
    Otherwise the slopes of the next lower power of two m come first, then as many as are missing of
    every second slope of 2m heads: 40 heads have the 32 slopes, then 2^(-8j/64) for j = 1, 3, ..., 15.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-8.0 * j / (2 * power)) for j in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin for half rotation, fp32 [..., head_dim], of integer positions [...].

    Dim pair (i, i + head_dim/2) turns by position * theta^(-2i/head_dim) (Su et al. 2021, "RoFormer").
    fp32 whatever the model's type: in bf16 positions above 256 are no longer distinct.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[..., None] * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def segment_positions(segment_ids: Tensor) -> Tensor:
    """Positions [batch, sequence] that restart at 0 wherever the id of [batch, sequence] changes."""
    index = torch.arange(segment_ids.shape[-1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    # The running maximum of the starts seen so far is where the current segment began.
    return index - (index * starts).cummax(dim=-1).values
