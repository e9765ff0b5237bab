"""A checkpoint that is written beside the training: of the moment it was asked for, and none the worse."""

from __future__ import annotations

import threading

import pytest
import torch

from bc2exp.parallel.layout import parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.train import TrainingError
from bc2exp.train import checkpoint as module
from bc2exp.train.checkpoint import Progress
from tests.train.parts import ONE_RANK, adamw, make_checkpoints, make_model, make_trainer, save
from tests.train.test_checkpoint import assert_same_bits, bits, load, names


@pytest.fixture
def trainer(tmp_path):
    """A trainer of 6 steps that saves every second one beside the training."""
    model = make_model()
    checkpoints, _ = make_checkpoints(tmp_path)
    return make_trainer(
        tmp_path,
        model,
        optimizer=adamw(model),
        checkpoints=checkpoints,
        save_every=2,
        saves_beside=True,
        steps=6,
    )


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until the gate is opened; `gate.reached` is set when it waits."""
    gate = threading.Event()
    gate.reached = threading.Event()
    write = module.write_state

    def waiting(*arguments):
        gate.reached.set()
        assert gate.wait(60)
        return write(*arguments)

    monkeypatch.setattr(module, "write_state", waiting)
    yield gate
    gate.set()


def test_what_is_saved_is_the_state_of_the_step_and_not_what_the_training_makes_of_it(tmp_path, gate):
    model = make_model()
    optimizer = adamw(model)
    checkpoints, _ = make_checkpoints(tmp_path)
    make_trainer(tmp_path, model, optimizer=optimizer, steps=2).run(0)
    wanted = {name: value.clone() for name, value in bits(model, optimizer).items()}
    layout = parallelize(model, Mesh(ONE_RANK), precision="fp32")
    checkpoints.save(layout, optimizer, Progress(2, 16), beside=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
            optimizer.state[parameter]["exp_avg"].zero_()
    assert gate.reached.wait(60)
    assert checkpoints.finished() is None
    assert names(tmp_path) == []
    gate.set()
    assert checkpoints.finished(wait=True).step == 2
    progress, _, loaded, moments = load(tmp_path)
    assert progress == Progress(2, 16)
    assert_same_bits(bits(loaded, moments), wanted)


def test_the_training_goes_on_while_a_checkpoint_is_written(trainer, tmp_path, gate):
    seen = []
    batches = trainer.batches

    def watched(step):
        if step == 3:  # of the fourth step, after the checkpoint of the second was begun
            assert gate.reached.wait(60)
            seen.append(names(tmp_path))
            gate.set()
        return batches(step)

    trainer.batches = watched
    assert trainer.run(0) == "done"
    assert seen == [[]]
    saved = [event for event in trainer.journal.events if event["event"] == "checkpoint"]
    assert [event["step"] for event in saved] == [2, 4, 6]
    assert names(tmp_path) == [f"step-0000000{step}" for step in (2, 4, 6)]


def test_saving_beside_changes_no_bit_of_checkpoints_or_training(trainer, tmp_path):
    trainer.run(0)
    model = make_model()
    checkpoints, _ = make_checkpoints(tmp_path / "waiting")
    other = make_trainer(
        tmp_path, model, optimizer=adamw(model), checkpoints=checkpoints, save_every=2, steps=6
    )
    other.run(0)
    assert trainer.journal.series("train/loss") == other.journal.series("train/loss")
    for step in (2, 4, 6):
        folders = [root / "checkpoints" / f"step-0000000{step}" for root in (tmp_path, tmp_path / "waiting")]
        mine, theirs = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
        assert mine == theirs


def test_a_stop_waits_for_the_checkpoint_that_is_being_written(trainer, tmp_path, gate):
    batches = trainer.batches

    def stopping(step):
        if step == 2:
            trainer.stop_file.touch()
            threading.Timer(0.5, gate.set).start()
        return batches(step)

    trainer.batches = stopping
    assert trainer.run(0) == "stopped"
    assert names(tmp_path) == ["step-00000002"]
    assert load(tmp_path)[0] == Progress(2, 16)


def test_an_error_of_the_training_leaves_the_checkpoint_that_is_being_written(trainer, tmp_path, gate):
    batches = trainer.batches

    def failing(step):
        if step == 2:
            threading.Timer(0.5, gate.set).start()
            raise ZeroDivisionError
        return batches(step)

    trainer.batches = failing
    with pytest.raises(ZeroDivisionError):
        trainer.run(0)
    assert load(tmp_path)[0] == Progress(2, 16)
    assert [event["step"] for event in trainer.journal.events if event["event"] == "checkpoint"] == [2]


def test_what_goes_wrong_in_writing_ends_the_training_at_its_next_step(trainer, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "there")

    trainer.steps = 3
    trainer.run(0)
    monkeypatch.setattr(module, "write_state", full)
    trainer.steps = 9
    with pytest.raises(OSError, match="No space left on device"):
        trainer.run(3)
    # saved at 4, noticed at the latest where the next is to be saved
    assert max(trainer.journal.steps["train/loss"]) in (4, 5, 6)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("where", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nothing_is_written_of_a_state_that_is_not_finite(trained, tmp_path, where, value):
    run = trained(tmp_path)
    parameter = run.model.norm.weight
    with torch.no_grad():
        (parameter if where == "weight" else run.optimizer.state[parameter][where])[3] = value
    with pytest.raises(TrainingError, match=r"norm\.weight holds a value that is not finite"):
        run.save_next()
    assert names(tmp_path) == ["step-00000001"]
    assert load(tmp_path)[0] == Progress(1, 8)


def test_older_checkpoints_stay_where_the_new_one_cannot_be_read_again(trained, tmp_path, monkeypatch):
    run = trained(tmp_path)
    publish = module.atomic.publish_folder

    def bending(temporary, final):
        publish(temporary, final)
        file = final / "exp_avg.safetensors"
        data = bytearray(file.read_bytes())
        data[-7] ^= 0x10
        file.write_bytes(data)

    monkeypatch.setattr(module.atomic, "publish_folder", bending)
    assert run.save_next() is None
    assert run.told[0].startswith("the checkpoint just written is damaged and was removed: ")
    assert names(tmp_path) == ["step-00000001"]
    monkeypatch.setattr(module.atomic, "publish_folder", publish)
    saved = run.save_next(3)
    assert [path.name for path in saved.removed] == ["step-00000001"]
    assert names(tmp_path) == ["step-00000003"]


def test_a_disk_with_too_little_room_is_said_before_anything_is_written(trained, tmp_path, monkeypatch):
    run = trained(tmp_path)
    free = module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"a checkpoint needs 0\.00 GiB, and 0\.00 are free"):
        run.save_next()
    assert names(tmp_path) == ["step-00000001"]


def test_one_flipped_bit_anywhere_is_found_and_the_checkpoint_before_it_used(tmp_path):
    model = make_model()
    checkpoints, _ = make_checkpoints(tmp_path)
    optimizer = adamw(model)
    make_trainer(tmp_path, model, optimizer=optimizer, checkpoints=checkpoints, save_every=1, steps=2).run(0)
    newest = tmp_path / "checkpoints" / "step-00000002"
    files = sorted(newest.iterdir())
    sizes = [file.stat().st_size for file in files]
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 8 * sum(sizes), (50,), generator=generator).tolist()
    # and what no tensor depends on: the length of the header, its braces, a word that nobody reads
    for number, file in enumerate(files):
        idle = file.read_bytes().find(b'pt"')
        places += [8 * (sum(sizes[:number]) + at) + at % 8 for at in (0, 7, 8, idle) if at >= 0]
    for bit in places:
        number, at = 0, bit // 8
        while at >= sizes[number]:
            at -= sizes[number]
            number += 1
        whole = files[number].read_bytes()
        data = bytearray(whole)
        data[at] ^= 1 << bit % 8
        files[number].write_bytes(data)
        progress, told, _, _ = load(tmp_path)
        assert progress == Progress(1, 8), (files[number].name, at)
        (text,) = told
        assert f"step-00000002/{files[number].name}: " in text, text
        is_tensors = files[number].suffix == ".safetensors"
        if is_tensors and at >= 8 + int.from_bytes(whole[:8], "little"):
            assert "tensor '" in text, text
        files[number].write_bytes(whole)
    assert load(tmp_path)[0] == Progress(2, 16)


def test_what_the_order_of_samples_depends_on_is_compared(tmp_path):
    model = make_model()
    optimizer = adamw(model)
    make_trainer(tmp_path, model, optimizer=optimizer, steps=1).run(0)
    layout = parallelize(model, Mesh(ONE_RANK), precision="fp32")
    origin = {"seed": 42, "the digest of the data": "1a2b"}
    save(make_checkpoints(tmp_path, origin=origin)[0], layout, optimizer, Progress(1, 8))
    same, told = make_checkpoints(tmp_path, origin={**origin, "new": 1})
    assert same.load_newest(layout, optimizer) == Progress(1, 8)
    assert told == []
    before = {name: value.clone() for name, value in bits(model, optimizer).items()}
    changed = {"seed": 43, "the digest of the data": "3c4d"}
    other, _ = make_checkpoints(tmp_path, origin=changed)
    with pytest.raises(module.UserError) as error:
        other.load_newest(layout, optimizer)
    text = str(error.value)
    assert "step-00000001: seed was 42 and is 43, the digest of the data was 1a2b and is 3c4d; " in text
    assert "task.accept_changes=true" in text
    assert_same_bits(bits(model, optimizer), before)
    accepting, told = make_checkpoints(tmp_path, origin=changed, accept_changes=True)
    assert accepting.load_newest(layout, optimizer) == Progress(1, 8)
    assert told[0].startswith("going on with changes: ")
