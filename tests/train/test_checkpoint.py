"""Checkpoints: an exact continuation, the newest whole one wins, and nothing unneeded stays."""

from __future__ import annotations

import pytest
import torch

from bc2exp.config.errors import UserError
from bc2exp.parallel.layout import parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.train.checkpoint import Progress
from tests.train.parts import ONE_RANK, adamw, make_checkpoints, make_model, make_trainer, save


def trained(folder, steps, start=0, model=None, optimizer=None, **changes):
    """Train to `steps` with a checkpoint after every step; (model, optimizer, losses)."""
    model = model or make_model()
    optimizer = optimizer or adamw(model)
    checkpoints, _ = make_checkpoints(folder)
    parts = {"optimizer": optimizer, "checkpoints": checkpoints, "save_every": 1, **changes}
    trainer = make_trainer(folder, model, steps=steps, **parts)
    trainer.run(start)
    return model, optimizer, trainer.journal.steps["train/loss"]


def bits(model, optimizer):
    """Everything that training changes, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach()
        found |= {f"{name} {key}": value for key, value in optimizer.state[parameter].items()}
    return found


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture
def run(tmp_path):
    """A folder with checkpoints of steps 1, 2 and 3."""
    trained(tmp_path, 3)
    return tmp_path


def load(folder, model=None):
    model = model or make_model(seed=9)
    optimizer = adamw(model)
    checkpoints, told = make_checkpoints(folder)
    layout = parallelize(model, Mesh(ONE_RANK), precision="fp32")
    return checkpoints.load_newest(layout, optimizer), told, model, optimizer


def test_a_training_continued_from_a_checkpoint_is_the_unbroken_one(tmp_path):
    whole, optimizer, losses = trained(tmp_path / "unbroken", 6)
    trained(tmp_path / "broken", 3)
    progress, told, model, continued = load(tmp_path / "broken")
    assert (progress, told) == (Progress(3, 24), [])
    _, _, later = trained(tmp_path / "broken", 6, 3, model, continued)
    assert_same_bits(bits(model, continued), bits(whole, optimizer))
    assert later == {step: losses[step] for step in (4, 5, 6)}


def test_moments_and_step_are_loaded_and_not_only_weights(run):
    _, _, model, optimizer = load(run)
    state = optimizer.state[model.lm_head.weight]
    assert state["step"] == 3
    assert state["exp_avg"].abs().sum() > 0
    assert state["exp_avg_sq"].abs().sum() > 0


def test_without_checkpoints_there_is_nothing_to_load(tmp_path):
    assert load(tmp_path)[0] is None


def flip(file):
    data = bytearray(file.read_bytes())
    data[-7] ^= 0x10
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "a flipped bit in the weights": lambda folder: flip(folder / "model.safetensors"),
    "a flipped bit in a moment": lambda folder: flip(folder / "exp_avg_sq.safetensors"),
    "a file cut short": lambda folder: truncate(folder / "exp_avg.safetensors"),
    "a file missing": lambda folder: (folder / "exp_avg.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a manifest cut short": lambda folder: truncate(folder / "manifest.json"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_passed_over_and_said(run, damage):
    DAMAGES[damage](run / "checkpoints" / "step-00000003")
    progress, told, model, optimizer = load(run)
    assert progress == Progress(2, 16)
    assert len(told) == 1
    assert told[0].startswith("checkpoint passed over:")
    assert "step-00000003" in told[0]
    assert_same_bits(bits(model, optimizer), bits(*trained(run / "again", 2)[:2]))


def test_where_every_checkpoint_is_damaged_nothing_is_loaded(run):
    for folder in (run / "checkpoints").iterdir():
        flip(folder / "model.safetensors")
    model = make_model(seed=9)
    with pytest.raises(UserError, match="no checkpoint is whole") as error:
        load(run, model)
    assert all(f"step-0000000{step}" in str(error.value) for step in (1, 2, 3))
    same = make_model(seed=9).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_another_model_is_refused(run):
    model = make_model()
    del model.layers["1"]
    with pytest.raises(UserError, match=r"is of another model: layers\.1\..* and 8 more differ"):
        load(run, model)
    model = make_model()
    model.norm.weight = torch.nn.Parameter(torch.ones(33))
    with pytest.raises(UserError, match=r"is of another model: norm\.weight"):
        load(run, model)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def saved(folder, step, keep=9):
    model = make_model()
    checkpoints, _ = make_checkpoints(folder, keep)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(model)
    optimizer.step()
    layout = parallelize(model, Mesh(ONE_RANK), precision="fp32")
    return save(checkpoints, layout, optimizer, Progress(step, 8 * step))


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 10, 12):
        saved(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000012"]


def test_a_half_built_checkpoint_is_no_checkpoint_and_the_next_save_removes_it(run):
    half = run / "checkpoints" / ".step-00000004.1a2b3c4d"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert load(run)[0] == Progress(3, 24)
    assert half.exists()
    saved(run, 4)
    assert names(run) == [f"step-0000000{step}" for step in (1, 2, 3, 4)]


def test_a_damaged_newer_checkpoint_never_outlives_a_whole_older_one(run):
    flip(run / "checkpoints" / "step-00000003" / "model.safetensors")
    flip(run / "checkpoints" / "step-00000002" / "model.safetensors")
    assert load(run)[0] == Progress(1, 8)
    saved(run, 2, keep=1)  # the training goes on from step 1
    assert names(run) == ["step-00000002"]
    assert load(run)[0] == Progress(2, 16)
