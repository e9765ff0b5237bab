"""Fine-tuning in a layout is fine-tuning in one process: rows packed by each rank for itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bc2exp.config.load import read
from bc2exp.data.packing import Packer
from bc2exp.tasks.finetune import finetune
from bc2exp.weights import load_hf
from tests.small_run import SMALL, small_config
from tests.train.parts import Memory

MODEL = tuple(word for word in SMALL if word.startswith("model."))
WORDS = (
    *("task=finetune", *MODEL, "dataset.sequence_length=64", "task.global_batch=16"),
    *("task.epochs=null", "task.steps=5", "task.eval_every=3", "task.eval_samples=37"),
)


def do(world, folder):
    """Do the task that `folder` holds the configuration of; its series, and the passes without any row."""
    journal, empty = Memory(), 0
    assemble = Packer._assemble

    def counting(packer, planned):
        nonlocal empty
        empty += not any(planned.sequences)
        return assemble(packer, planned)

    Packer._assemble = counting
    try:
        assert finetune(read(folder / "resolved.yaml"), folder, world, journal) == "done"
    finally:
        Packer._assemble = assemble
    names = ("train/loss", "train/grad_norm", "eval/loss", "data/tokens_per_step")
    return [journal.series(name) for name in names], empty


@pytest.fixture(scope="module")
def reference(ranks, tmp_path_factory) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """What one process comes to."""
    folder: Path = tmp_path_factory.mktemp("single")
    small_config(folder, *WORDS)
    ((series, _),) = ranks(1, do, folder)
    return series, load_hf(folder / "weights").state_dict()


LAYOUTS = {
    "zero2": ("hardware=2cpu", "parallelism=zero2"),
    "zero2, a row a pass": ("hardware=2cpu", "parallelism=zero2", "task.micro_batch=1"),
    "pp2": ("hardware=2cpu", "parallelism=pp2"),
    "tp2 x zero3, recomputed": ("hardware=4cpu", "parallelism=tp2_zero3", "parallelism.recompute=full"),
    "bucketed": ("hardware=4cpu", "parallelism=zero2", "dataset.packing=bucketed", "task.micro_batch=2"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_one_process(ranks, reference, tmp_path, name):
    config = small_config(tmp_path, *WORDS, *LAYOUTS[name])
    answers = ranks(config.hardware.num_devices, do, tmp_path)
    series, weights = reference
    for mine, theirs in zip(answers[0][0], series, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    for key, weight in load_hf(tmp_path / "weights").state_dict().items():
        torch.testing.assert_close(weight, weights[key], rtol=0, atol=1e-5)
    if name == "bucketed":  # ranks that have fewer passes do empty ones
        assert sum(empty for _, empty in answers) > 0
