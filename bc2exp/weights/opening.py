"""Any folder of weights, whichever layout it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bc2exp.config.weight_files import MEGATRON, shape_differences, weight_kind
from bc2exp.weights.hf import open_hf, read_shape
from bc2exp.weights.layout import Weights
from bc2exp.weights.megatron import open_megatron


def open_weights(folder: Path, shape: Mapping[str, Any]) -> Weights:
    """The weights in `folder`, which are to be of a model of this `shape`.

    Raises ValueError where they are of another one, telling the fields that differ, or where the folder is
    refused, as `open_hf` and `open_megatron` do.
    """
    if weight_kind(folder) == MEGATRON:
        return open_megatron(folder, shape)
    differing = shape_differences(read_shape(folder), shape)
    if differing:
        raise ValueError(f"is of another model: {'; '.join(differing)}")
    return open_hf(folder)
