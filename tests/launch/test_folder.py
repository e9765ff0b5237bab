"""Which folder a command gets: a new one, the unfinished run of the same configuration, the one it names."""

from __future__ import annotations

import copy
import errno
import functools
import json
from datetime import datetime

import pytest

from bc2exp.config.errors import UserError
from bc2exp.config.load import digest
from bc2exp.launch.folder import claim, default_folder, writable
from bc2exp.tracking.journal import Journal
from tests.small_run import small_plain

NOW = datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small configuration, composed once."""
    return small_plain(tmp_path_factory.mktemp("small"))


@pytest.fixture
def take(tmp_path, small):
    """take(resume="auto", chosen=None, **{"seed": 2, "task.steps": 3}): claim in tmp_path as a command with
    these values would, and leave what the parent then writes there."""
    claimed = []

    def take(resume="auto", chosen=None, **values):
        plain = copy.deepcopy(small)
        for key, value in {"task.resume": resume, **values}.items():
            *groups, name = key.split(".")
            functools.reduce(dict.__getitem__, groups, plain)[name] = value
        folder = claim(plain, tmp_path, chosen, NOW)
        claimed.append(folder)
        if not folder.resumed:
            run = {"digest": digest(plain), "created": float(len(claimed))}
            (folder.path / "run.json").write_text(json.dumps(run))
        (folder.path / "resolved.yaml").write_text(json.dumps(plain))
        return folder

    yield take
    for folder in claimed:
        folder.lock.release()


def end(folder, event=None, segment=0):
    """The process of a run ends, with an outcome or without."""
    with Journal(folder.path / "metrics.jsonl", segment) as journal:
        journal.event("start", step=0, steps=3)
        if event:
            journal.event(event)
    folder.lock.release()


def test_a_new_run_gets_a_folder_named_by_task_model_time_and_configuration(take, tmp_path, small):
    folder = take()
    assert not folder.resumed
    name = f"runs/pretrain-tiny_7b/2026-01-02_03-04-05-{digest(small)}"
    assert folder.path == tmp_path / name == default_folder(small, tmp_path, NOW)
    assert folder.path.is_dir()


@pytest.mark.parametrize("event", [None, "failed", "stopped"])
def test_an_unfinished_run_of_the_same_configuration_goes_on(take, event):
    first = take()
    end(first, event)
    again = take(**{"tracking.run_name": "other"})  # how it is recorded is no part of what it computes
    assert again.resumed
    assert again.path == first.path


def test_a_finished_run_is_left_alone(take):
    first = take()
    end(first, "done")
    again = take()
    assert not again.resumed
    assert again.path == first.path.with_name(first.path.name + "-2")


def test_a_run_that_went_on_after_it_was_done_is_unfinished(take):
    first = take()
    end(first, "done")
    with Journal(first.path / "metrics.jsonl", 1) as journal:
        journal.event("start", step=3, steps=6)
    assert take().path == first.path


def test_another_configuration_is_another_run(take):
    first = take()
    end(first)
    assert take(seed=2).path != first.path


def test_never_begins_anew(take):
    first = take()
    end(first)
    assert not take(resume="never").resumed


def test_a_run_that_is_going_on_is_not_taken_and_a_second_start_in_its_second_gets_its_own(take):
    first, second, third = take(), take(), take()
    assert [folder.resumed for folder in (first, second, third)] == [False] * 3
    names = [folder.path.name for folder in (first, second, third)]
    assert names == [names[0], f"{names[0]}-2", f"{names[0]}-3"]


def test_of_several_unfinished_runs_the_newest_goes_on(take):
    folders = [take(), take(), take()]
    for folder, created in zip(folders, (30.0, 50.0, 40.0), strict=True):
        end(folder)
        file = folder.path / "run.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "created": created}))
    assert take().path == folders[1].path


def test_a_folder_without_a_readable_record_is_passed_over(take):
    first = take()
    end(first)
    (first.path / "run.json").write_text("{")
    assert not take().resumed


def test_a_journal_that_is_damaged_is_said(take):
    first = take()
    end(first)
    (first.path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl.*this run cannot go on, task\.resume=never starts"):
        take()
    with pytest.raises(UserError, match="this run cannot go on"):
        take(resume=str(first.path))


def test_a_named_run_goes_on_even_finished_but_not_while_it_runs(take):
    first = take()
    with pytest.raises(UserError, match="this run is going on in another process"):
        take(resume=str(first.path))
    end(first, "done")
    again = take(resume=str(first.path), **{"task.steps": 999})
    assert again.resumed
    assert again.path == first.path


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.num_layers", 3, "model.num_layers=2 (here 3)"),
        ("model.position", "alibi", "model.position=rope (here alibi)"),
        ("task.name", "finetune", "task.name=pretrain (here finetune)"),
    ],
)
def test_a_named_run_of_another_model_or_task_is_refused(take, key, value, said):
    first = take()
    end(first, "done")
    with pytest.raises(UserError) as error:
        take(resume=str(first.path), **{key: value})
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seed", 43, "seed=42 (here 43)"),
        ("task.global_batch", 16, "task.global_batch=8 (here 16)"),
        ("model.tokenizer", "/other.model", "model.tokenizer=null (here /other.model)"),
        ("dataset.sequence_length", 64, "dataset.sequence_length=32 (here 64)"),
        ("dataset.path", "/other.txt", "dataset.path=null (here /other.txt)"),
    ],
)
def test_a_named_run_of_other_samples_needs_a_word_of_its_own(take, key, value, said):
    first = take()
    end(first, "stopped")
    with pytest.raises(UserError) as error:
        take(resume=str(first.path), **{key: value})
    assert f"that run has {said}; with other samples" in str(error.value)
    assert take(resume=str(first.path), **{key: value, "task.accept_changes": True}).resumed


def test_what_no_sample_depends_on_may_change(take):
    first = take()
    end(first, "stopped")
    changes = {"task.optimizer.lr": 0.5, "task.micro_batch": 2, "hardware.precision": "fp32"}
    assert take(resume=str(first.path), **changes, **{"dataset.workers": 3}).resumed


def test_a_chosen_folder_is_made(take, tmp_path):
    folder = take(chosen=tmp_path / "a" / "b")
    assert folder.path == tmp_path / "a" / "b"
    assert not folder.resumed


def test_a_chosen_folder_goes_on_with_its_own_run(take, tmp_path):
    first = take(chosen=tmp_path / "a")
    end(first)
    assert take(chosen=tmp_path / "a").resumed


def test_a_run_in_a_chosen_folder_outside_runs_is_not_found_without_it(take, tmp_path):
    first = take(chosen=tmp_path / "a")
    end(first)
    assert not take().resumed


REFUSALS = {
    "finished": ({}, "auto", "done", "this run is finished"),
    "of another configuration": (
        {"seed": 2},
        "auto",
        None,
        "of another configuration, with seed=42 (here 2); ",
    ),
    "never": ({}, "never", None, "holds a run, and task.resume=never"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_a_chosen_folder_with_a_run_that_cannot_go_on_is_refused(take, tmp_path, case):
    values, resume, event, said = REFUSALS[case]
    first = take(chosen=tmp_path / "a")
    end(first, event)
    with pytest.raises(UserError) as error:
        take(chosen=tmp_path / "a", resume=resume, **values)
    assert str(error.value).startswith(f"hydra.run.dir={tmp_path}/a: ")
    assert said in str(error.value)


def test_a_chosen_folder_with_something_else_in_it_is_refused(take, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.tex and no run; name a new or empty folder"):
        take(chosen=tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.tex"]


def test_a_disk_that_cannot_be_written_to_is_a_sentence(take, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/b cannot be written \(Not a directory"):
        take(chosen=tmp_path / "file" / "b")
    with pytest.raises(UserError, match="No space left on device"), writable(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
