"""What the sides of a benchmark are given: real data, weights, a configuration.

Real data lies in BC2EXP_SHARED_DATA, else in ../shared/data beside the checkout.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from record import ROOT

if TYPE_CHECKING:
    from bc2exp.config.root import Config

FOLDER = Path(os.environ.get("BC2EXP_SHARED_DATA", ROOT.parent / "shared" / "data"))
WAIMAI = FOLDER / "waimai_10k.csv"
ALPACA = FOLDER / "train-00000-of-00001-a09b74b3ef9c3b56.parquet"
TOKENIZER = FOLDER / "tokenizer" / "baichuan2_tokenizer.model"


def take(parser: argparse.ArgumentParser, **files: Path) -> argparse.Namespace:
    """The arguments, with an option for each of the files; ends with exit code 2 where one is missing."""
    for name, default in files.items():
        parser.add_argument(f"--{name}", type=Path, default=default)
    args = parser.parse_args()
    for name in files:
        path = getattr(args, name)
        if not path.is_file():
            parser.error(f"--{name}: there is no {path}; name the file, or its folder in BC2EXP_SHARED_DATA")
        setattr(args, name, path.absolute())
    return args


def weights(folder: Path, shape: dict[str, Any]) -> None:
    """Fresh weights of a model with rotary positions, in `folder`/weights, and the same as a Llama in
    `folder`/llama, the rows of its head normalised once."""
    import torch

    from bc2exp.model.baichuan2 import initial_tensor
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
