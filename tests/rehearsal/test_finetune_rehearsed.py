"""The recipe's command on rehearsed devices, packed: the same losses as on the CPU."""

from __future__ import annotations

import json

import pytest

from tests.hardware import npu_device
from tests.launch.commands import Launch, values

npu_device.require()

RECIPE = (
    *("task=finetune", "model=tiny_7b", "dataset=embedded_reviews", "dataset.sequence_length=64"),
    *("hardware.precision=fp32", "task.global_batch=32", "task.micro_batch=1", "task.epochs=null"),
    *("task.steps=3", "dataset.num_train=96", "task.eval_samples=40"),
)


@pytest.fixture
def launch(tmp_path):
    made = Launch(tmp_path / "launch")
    yield made
    made.close()


def test_losses_are_those_of_the_cpu(launch, tmp_path):
    launch.run("hardware=8npu", "hardware.rehearsal=true", *RECIPE, "parallelism.recompute=full")
    rehearsed = launch.only_run()
    here = Launch(tmp_path / "here")
    here.run("hardware=cpu", "parallelism=single", *RECIPE)
    alone = here.only_run()
    for metric in ("train/loss", "train/grad_norm", "eval/loss"):
        mine, theirs = values(rehearsed, metric), values(alone, metric)
        assert list(mine) == list(theirs)
        assert list(mine.values()) == pytest.approx(list(theirs.values()), abs=1e-5)
    # each rank packs its four rows of a step for itself
    work = json.loads((rehearsed / "summary.json").read_text())["work"]
    assert work["packing"] == "packed"
    assert work["tokens"] < work["positions"] < work["positions_padded"] / 1.5
    counted = json.loads((rehearsed / "rehearsal.json").read_text())
    assert counted["ranks"] == 8
    assert counted["cpu_fallbacks"] == {}
    assert counted["operators"]["npu::npu_fusion_attention_grad"]["calls"] > 0
