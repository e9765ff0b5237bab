"""Small models of both kinds, and batches for them."""

from __future__ import annotations

import torch

from bc2exp.hardware import get_backend
from bc2exp.model import Baichuan2, init_weights

VOCAB = 131


def small_model(position: str, *, std: float = 0.1, **changes) -> Baichuan2:
    """Two layers, six heads (no power of two), weights wide enough for every part to matter."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 2,
        "num_heads": 6,
        "ops": get_backend("cpu").ops,
    } | changes
    model = Baichuan2(position=position, **settings)
    init_weights(model, seed=3, std=std)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # ones would hide a norm in the wrong place
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length] without the padding id."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Labels: the following token, -100 after the last."""
    return torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1)
