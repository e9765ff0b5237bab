"""Which sample comes when: a pure function of the seed and the number of samples consumed.

Nothing is stored and nothing advances, so a run resumed at any step, on any number of ranks, sees exactly
the samples that the run without a break would have seen.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any parts, the same in every process and on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> torch.Tensor:
    """The permutation of an epoch: int64 [num_samples]."""
    generator = torch.Generator().manual_seed(stable_seed("order", seed, epoch))
    return torch.randperm(num_samples, generator=generator)


def sample_at(position: int, *, seed: int, num_samples: int) -> int:
    """The sample that is consumed as number `position` (from 0), epochs one after the other."""
    epoch, offset = divmod(position, num_samples)
    return int(epoch_order(seed, epoch, num_samples)[offset])
