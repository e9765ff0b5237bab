"""The values that training from nothing starts with."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from bc2exp.model.baichuan2 import PADDING_ID


def init_weights(model: nn.Module, *, seed: int, std: float) -> None:
    """Give every parameter its `initial_tensor`; the model must have storage."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_tensor(name, tuple(parameter.shape), seed=seed, std=std))


def initial_tensor(name: str, shape: tuple[int, ...], *, seed: int, std: float) -> Tensor:
    """The initial value of the parameter `name` of a Baichuan2, fp32 on the CPU.

    Norms are 1, the head kaiming_uniform(a = sqrt 5), linear layers and the embedding N(0, std) with a
    padding row of 0. A function of its arguments alone, by a generator of its own seeded from the
    name: the same weights whatever the device, the layout and the order of creation.
    """
    value = torch.ones(shape, dtype=torch.float32)
    if name.endswith("norm.weight"):
        return value
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if name.endswith("lm_head.weight"):
        return nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    value.normal_(0.0, std, generator=generator)
    if name.endswith("embed_tokens.weight"):
        value[PADDING_ID] = 0.0
    return value
