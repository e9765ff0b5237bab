"""The pretraining task on one rank, from its configuration to its files; and what it refuses."""

from __future__ import annotations

import csv
import shutil

import pytest
import torch
from safetensors.torch import load_file

from bc2exp.config.errors import UserError
from bc2exp.parallel.world import World
from bc2exp.tasks import get_task
from bc2exp.tasks.build import total_steps
from bc2exp.tasks.pretrain import pretrain
from bc2exp.train.checkpoint import Checkpoints
from bc2exp.weights import load_hf
from tests.small_run import small_config
from tests.train.parts import ONE_RANK, Memory

STEPS = ("task.steps=3", "task.eval_every=2")


def do(folder, *words, world: World = ONE_RANK):
    """Do the task in `folder`; its journal."""
    journal = Memory()
    journal.outcome = pretrain(small_config(folder, *words), folder, world, journal)
    return journal


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: (folder, journal)."""
    folder = tmp_path_factory.mktemp("run")
    return folder, do(folder, *STEPS)


def test_the_task_is_found_by_its_name():
    assert get_task("pretrain") is pretrain


def test_a_run_leaves_its_journal(run):
    folder, journal = run
    assert journal.outcome == "done"
    assert list(journal.steps["train/loss"]) == [1, 2, 3]
    assert list(journal.steps["eval/loss"]) == [2, 3]
    assert journal.events[0]["event"] == "preparing"
    told = [event for event in journal.events if event["event"] != "preparing"]
    assert [event["event"] for event in told] == ["data", "start", "checkpoint"]
    data, start, checkpoint = told
    assert (start["step"], start["steps"], start["world_size"]) == (0, 3, 1)
    assert (folder / checkpoint["path"]).is_dir()
    assert data["name"] == "embedded"
    assert data["tokens"] > data["train_tokens"] > 32 * data["train_samples"] > 0
    assert len(data["digest"]) == 36


def test_the_exported_weights_are_those_of_the_last_checkpoint(run):
    folder, _ = run
    exported = load_hf(folder / "weights").state_dict()
    checkpoint = Checkpoints(folder / "checkpoints", keep=1, world=ONE_RANK, tell=print).list()[-1]
    saved = load_file(checkpoint / "model.safetensors")
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    assert (folder / "weights" / "tokenizer.model").is_file()


FROZEN = ("task.optimizer.lr=1e-9", "task.schedule.min_lr=0")


def test_a_run_begins_from_given_weights(run, tmp_path):
    folder, journal = run
    trained = do(tmp_path, *STEPS, f"model.weights={folder}/weights", *FROZEN).steps
    assert trained["train/loss"][1] < journal.steps["train/loss"][1] - 0.05
    assert trained["eval/loss"][3] == pytest.approx(journal.steps["eval/loss"][3], abs=1e-3)


def test_a_finished_run_goes_further_with_more_steps_and_other_weights(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    before = (folder / "weights" / "model.safetensors.index.json").stat().st_mtime_ns
    journal = do(folder, "task.steps=5", "task.eval_every=2")
    assert list(journal.steps["train/loss"]) == [4, 5]
    assert [event["step"] for event in journal.events if event["event"] == "start"] == [3]
    assert (folder / "weights" / "model.safetensors.index.json").stat().st_mtime_ns != before


def test_fewer_steps_than_a_run_has_done_are_refused(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    with pytest.raises(UserError, match=r"task\.steps=2: this run has done 3 already"):
        do(folder, "task.steps=2", "task.eval_every=2")


def test_epochs_are_whole_global_batches(tmp_path):
    task = small_config(tmp_path, "task.steps=null", "task.epochs=2.5", "task.global_batch=8").task
    assert total_steps(task, 100) == 31
    with pytest.raises(UserError, match=r"task\.epochs=2\.5: 3 samples are fewer than one global batch of 8"):
        total_steps(task, 3)


def table(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def refused(folder, *words) -> str:
    with pytest.raises(UserError) as error:
        do(folder, *STEPS, *words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_column_that_is_missing_or_no_text(tmp_path):
    file = table(tmp_path / "a.csv", ["label", "review"], [[1, "好吃"], [0, "不好吃"]])
    named = ("dataset=text", f"dataset.path={file}")
    assert "has no such column; it has label, review" in refused(
        tmp_path / "1", *named, "dataset.column=text"
    )


def test_less_text_than_one_sample(tmp_path):
    file = table(tmp_path / "a.csv", ["text"], [["短"]])
    text = refused(tmp_path / "1", "dataset=text", f"dataset.path={file}", "dataset.column=text")
    assert text.startswith("dataset.sequence_length=32: the training part of text has only")


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows(tmp_path):
    assert "more than model.vocab_size=100 of tiny_7b" in refused(tmp_path, "model.vocab_size=100")


def test_a_tokenizer_with_fewer_pieces_is_noted(tmp_path):
    notes = [
        event for event in do(tmp_path, *STEPS, "model.vocab_size=8192").events if event["event"] == "note"
    ]
    assert len(notes) == 1
    assert "the rest is never trained on" in notes[0]["text"]


def test_weights_of_another_vocabulary(run, tmp_path):
    # the model's is that of the tokenizer, so the door cannot know
    shutil.copytree(run[0] / "weights", tmp_path / "weights")
    config = tmp_path / "weights" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 2048', '"vocab_size": 2000'))
    text = refused(tmp_path, f"model.weights={tmp_path}/weights")
    assert text.startswith(
        f"model.weights={tmp_path}/weights: is of another model: vocab_size is 2000 in the "
    )


def test_a_checkpoint_of_another_model(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    assert "is of another model" in refused(folder, "model.hidden_size=64")
