"""Rehearsals in the layouts that NPUs are used in: each trains what one process on the CPU trains."""

from __future__ import annotations

import json

import pytest

from tests.hardware import npu_device
from tests.launch.commands import Launch, values

npu_device.require()

from bc2exp.config.load import read  # noqa: E402
from bc2exp.tasks.plan import make_choice, make_planner  # noqa: E402
from bc2exp.tracking.journal import NullJournal  # noqa: E402

STEPS = 2
METRICS = ("train/loss", "train/grad_norm", "eval/loss")
CPU = ("hardware=cpu", "parallelism=single")
REHEARSED = ("hardware=8npu", "hardware.rehearsal=true")
LAYOUTS = {
    "tp8": (),
    "zero3": ("parallelism=zero3",),
    "pp2-tp4": ("parallelism.pipeline=2", "parallelism.tensor=4"),
}
MODELS = {
    "tiny_7b": ("model=tiny_7b", "model.hidden_size=256", "model.intermediate_size=688", "model.num_heads=8"),
    "tiny_13b": (
        "model=tiny_13b",
        "model.hidden_size=384",
        "model.intermediate_size=1024",
        "model.num_heads=24",
    ),
}
"""The models as they come, not the smaller ones of other tests: heads for 8 ranks."""
PACKED = "dataset.separate_documents=true"


def trained(folder, *words: str, steps: int = STEPS) -> dict[str, dict[int, float]]:
    """{metric: {step: value}} of a run in a launch folder of its own, `folder`."""
    launch = Launch(folder)
    try:
        launch.run(*words, f"task.steps={steps}", "task.eval_samples=8")
        return {metric: values(launch.only_run(), metric) for metric in METRICS}
    finally:
        launch.close()


def assert_memory_is_as_planned(folder) -> None:
    """The most that tensors took of a device, by torch_npu's own allocator, is what its plan says."""
    (run,) = (file.parent for file in folder.glob("runs/*/*/rehearsal.json"))
    taken = max(json.loads((run / "rehearsal.json").read_text())["peak_memory_bytes"])
    config = read(run / "resolved.yaml")
    planned = make_planner(config, NullJournal()).plan(make_choice(config), exact=True).memory.total
    assert taken == pytest.approx(planned, rel=0.1)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """on_cpu(*words): what the CPU trains with these words; each once."""
    known = {}

    def run(*words, **given):
        key = (words, *given.items())
        if key not in known:
            known[key] = trained(tmp_path_factory.mktemp("cpu") / "launch", *CPU, *words, **given)
        return known[key]

    return run


def assert_same(found, expected, **tolerance):
    for metric in METRICS:
        assert list(found[metric]) == list(expected[metric])
        assert list(found[metric].values()) == pytest.approx(list(expected[metric].values()), **tolerance)


@pytest.mark.parametrize(
    ("model", "layout", "more"),
    [
        ("tiny_13b", "tp8", ()),
        ("tiny_7b", "zero3", ()),
        ("tiny_13b", "pp2-tp4", ()),
        ("tiny_7b", "tp8", (PACKED,)),
        ("tiny_13b", "zero3", (PACKED,)),
    ],
    ids=["13b-tp8", "7b-zero3", "13b-pp2-tp4", "7b-tp8-packed", "13b-zero3-packed"],
)
def test_fp32_is_that_of_the_cpu(on_cpu, tmp_path, model, layout, more):
    words = (*MODELS[model], "hardware.precision=fp32", *more)
    found = trained(tmp_path / "launch", *REHEARSED, *LAYOUTS[layout], *words)
    assert_same(found, on_cpu(*words), abs=1e-5)
    if PACKED not in more:  # a plan takes documents not to be separated
        assert_memory_is_as_planned(tmp_path / "launch")


def test_packed_samples_are_others_than_those_in_one_piece(on_cpu):
    words = (*MODELS["tiny_7b"], "hardware.precision=fp32")
    apart, together = on_cpu(*words, PACKED), on_cpu(*words)
    assert abs(apart["train/loss"][1] - together["train/loss"][1]) > 1e-3


@pytest.mark.parametrize("model", ["tiny_7b", "tiny_13b"])
def test_bf16_is_that_of_the_cpu_within_its_rounding(on_cpu, tmp_path, model):
    words = (*MODELS[model], "hardware.precision=bf16")
    found = trained(tmp_path / "launch", *REHEARSED, *words)
    # 8 bits of a value, over the many values whose mean a loss is
    assert_same(found, on_cpu(*words), rel=2**-8)
    assert_memory_is_as_planned(tmp_path / "launch")


def test_saved_in_one_layout_and_resumed_in_another(on_cpu, tmp_path):
    words = (*MODELS["tiny_7b"], "hardware.precision=fp32")
    launch = Launch(tmp_path / "launch")
    common = (*REHEARSED, *words, "task.eval_samples=8", "task.schedule.kind=constant", "hydra.run.dir=moved")
    launch.run(*common, "task.steps=2")
    launch.run(*common, *LAYOUTS["zero3"], "task.steps=4", "task.resume=moved")
    expected = on_cpu(*words, "task.schedule.kind=constant", steps=4)
    found = values(launch.folder / "moved", "train/loss")
    launch.close()
    assert list(found) == [1, 2, 3, 4]
    assert list(found.values()) == pytest.approx(list(expected["train/loss"].values()), abs=1e-5)
