"""The same bits from the same input, twice in a row."""

from __future__ import annotations

import torch


def be_deterministic() -> None:
    """From now on torch takes deterministic kernels; where there is none, RuntimeError names the operator.

    Backends call it in `setup`; what collectives need is in `probe.rank_environment`.
    """
    torch.use_deterministic_algorithms(True)
    # It would also fill every fresh tensor with NaN, which costs time and finds bugs, but changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
