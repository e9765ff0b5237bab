"""Checkpoints: everything an exact continuation needs, in safetensors and JSON.

What needs no saving: the order of samples (a function of the seed and the samples consumed), the learning
rate (a function of the step), and the state of random generators (no operation of training draws from one).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bc2exp.config.errors import UserError
from bc2exp.parallel.shard import local, local_part_of, whole
from bc2exp.storage.tensors import DamagedCheckpoint, load_tensors, save_tensors

_MOMENTS = ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True)
class Progress:
    """How far a training is: optimizer steps done, samples consumed."""

    step: int
    samples: int


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds one folder a checkpoint, `step-00000040`.
        keep: how many of the newest stay.
        writes: whether this rank writes (rank 0).
        tell: gets a sentence when a damaged checkpoint is passed over.
    """

    folder: Path
    keep: int
    writes: bool
    tell: Callable[[str], None]

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Write a checkpoint; whole or not at all. Every rank must call it. Returns its folder."""
        path = self.folder / f"step-{progress.step:08d}"
        files: dict[str, dict[str, torch.Tensor]] = {"model.safetensors": {}}
        files |= {f"{moment}.safetensors": {} for moment in _MOMENTS}
        for name, parameter in model.named_parameters():
            files["model.safetensors"][name] = whole(parameter.detach())
            for moment in _MOMENTS:
                files[f"{moment}.safetensors"][name] = whole(optimizer.state[parameter][moment])
        if self.writes:
            self._clear(progress.step)
            save_tensors(path, files, {"step": progress.step, "samples": progress.samples})
            for old in self.list()[: -self.keep]:
                shutil.rmtree(old)
        return path

    def _clear(self, step: int) -> None:
        """Remove what a killed save left half built, and checkpoints that are not behind `step`: the run
        went on from an earlier one because they are damaged, and they must not count as the newest."""
        half_built = list(self.folder.glob(".step-*"))
        passed_over = [path for path in self.list() if _step_of(path) >= step]
        for path in half_built + passed_over:
            shutil.rmtree(path)

    def list(self) -> list[Path]:
        """Folders of whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.match(path.name))

    def load_newest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Continue from the newest checkpoint whose checksums hold; None where there is none.

        Raises UserError where checkpoints exist and every one is damaged, or is of another model.
        """
        problems = []
        for path in reversed(self.list()):
            try:
                files, extra = load_tensors(path)
            except DamagedCheckpoint as error:
                problems.append(str(error))
                self.tell(f"checkpoint passed over: {error}")
                continue
            _fill(model, optimizer, files, path)
            return Progress(int(extra["step"]), int(extra["samples"]))
        if problems:
            raise UserError(f"{self.folder}: no checkpoint is whole: {'; '.join(problems)}")
        return None


def _fill(
    model: nn.Module, optimizer: torch.optim.Optimizer, files: dict[str, dict[str, torch.Tensor]], path: Path
) -> None:
    weights = files["model.safetensors"]
    parameters = dict(model.named_parameters())
    wrong = sorted(set(weights) ^ set(parameters)) or [
        name for name, parameter in parameters.items() if parameter.shape != weights[name].shape
    ]
    if wrong:
        raise UserError(f"{path}: is of another model: {wrong[0]} and {len(wrong) - 1} more differ")
    step = torch.tensor(float(_step_of(path)), dtype=torch.float32)
    for name, parameter in parameters.items():
        with torch.no_grad():
            local(parameter.detach()).copy_(local_part_of(weights[name], parameter))
        state = optimizer.state[parameter]
        state["step"] = step.clone().to(parameter.device)
        for moment in _MOMENTS:
            state[moment] = torch.zeros_like(parameter)
            local(state[moment]).copy_(local_part_of(files[f"{moment}.safetensors"][name], parameter))


def _step_of(path: Path) -> int:
    match = _NAME.match(path.name)
    assert match is not None, path
    return int(match[1])
