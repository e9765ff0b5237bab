"""What the sides of a benchmark are given: weights, a configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bc2exp.config.root import Config


def weights(folder: Path, shape: dict[str, Any]) -> None:
    """Fresh weights of a model with rotary positions, in `folder`/weights, and the same as a Llama in
    `folder`/llama, the rows of its head normalised once."""
    import torch

    from bc2exp.model.initial import initial_tensor
    from bc2exp.weights import save_hf
    from bc2exp.weights.convert import convert
    from bc2exp.weights.hf import open_hf
    from bc2exp.weights.layout import model_shapes
    from bc2exp.weights.targets import Llama

    shape = {"position": "rope", **shape}
    sizes = model_shapes(shape).items()
    tensors = ((name, initial_tensor(name, size, seed=0, std=0.02)) for name, size in sizes)
    save_hf(tensors, folder / "weights", config=shape, dtype=torch.float32)
    convert(open_hf(folder / "weights"), folder / "llama", Llama())


def configuration(words: list[str], folder: Path) -> Config:
    """What a command with these words would run with."""
    from omegaconf import OmegaConf

    from bc2exp.config.load import finalize, read
    from bc2exp.config.preflight import preflight

    checked = preflight(words, sweep=False, folder=folder)
    if checked.problems:
        sys.exit("\n".join(checked.problems))
    file = folder / "resolved.yaml"
    file.write_text(OmegaConf.to_yaml(finalize(checked.jobs[0], folder)))
    return read(file)
