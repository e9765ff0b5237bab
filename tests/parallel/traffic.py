"""What ranks exchange: every collective and every send, as torch is asked for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "send": "send",
    "recv_": "receive",
}


class Traffic(TorchDispatchMode):
    """While it is entered: how often what was exchanged, by kind and by kind and type of number."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()
        self.types: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            kind = NAMES.get(name, name)
            self.kinds[kind] += 1
            first = args[0]
            tensor = first[0] if isinstance(first, (list, tuple)) else first
            self.types[kind, tensor.dtype] += 1
        return func(*args, **(kwargs or {}))
