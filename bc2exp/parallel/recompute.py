"""Recompute in backward instead of keeping from forward: memory against time. The numbers stay the same.

`full` keeps the input of each layer only, for a second forward pass. `selective` keeps everything but the
inside of the feed-forward networks (gate, up, their product): at the 7B's proportions half of what a layer
keeps (10 instead of 21 tensors of the size of the hidden states, fp32 on the CPU) for 45 % of the matrix
products of a forward pass. Attention is the dearer part to repeat, as its cost grows with the square of the
length, and it keeps little, as no operator keeps its scores.

What is recomputed includes the exchanges of tensor parallelism, so that their results are not kept either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bc2exp.model.baichuan2 import Baichuan2, DecoderLayer


def set_recompute(model: Baichuan2, kind: str) -> None:
    """Make `model` recompute `none`, `selective` or `full`, in place."""
    assert kind in ("none", "selective", "full"), kind
    if kind == "none":
        return
    for layer in cast(Iterable[DecoderLayer], model.layers.values()):
        module = layer if kind == "full" else layer.mlp
        module.forward = partial(_recomputed, module.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Tensor], *given: Any) -> Tensor:
    # no operation of training draws random numbers, so no generator has to be kept
    out: Tensor = checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=False)
    return out
