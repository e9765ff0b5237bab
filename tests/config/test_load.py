"""From a composition to what ranks read: absolute paths, a digest of what is computed, the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from bc2exp.config.checks import leaves
from bc2exp.config.compare import CompareConfig
from bc2exp.config.convert import ConvertConfig, Format
from bc2exp.config.evaluate import EvaluateConfig
from bc2exp.config.fields import field_of
from bc2exp.config.generate import GenerateConfig, Prompting
from bc2exp.config.load import digest, finalize, read
from bc2exp.config.model import ModelConfig, Position, Schedule
from bc2exp.config.overrides import assign
from bc2exp.config.task import DoctorConfig, PlanConfig, PretrainConfig, SyncConfig
from bc2exp.config.tasks import TASKS

Composed = Callable[..., DictConfig]


def final(config: DictConfig, folder: Path, **values: object) -> dict:
    """The final configuration with some values set; `__` in a name stands for a dot."""
    for name, value in values.items():
        assert assign(config, name.replace("__", "."), value) is None
    return finalize(config, folder)


def is_path(parent: DictConfig, name: str) -> bool:
    declared = field_of(parent, name)
    return declared is not None and bool(declared.metadata["path"])


def test_everything_is_resolved_and_plain(composed: Composed, tmp_path: Path) -> None:
    plain = final(composed("model=tiny_13b"), tmp_path)
    text = json.dumps(plain)
    assert json.loads(text) == plain
    assert "${" not in text
    assert plain["model"]["position"] == "alibi"
    assert plain["task"]["optimizer"]["lr"] == plain["model"]["recipes"]["pretrain"]["lr"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("./数据/外卖.csv", "{folder}/数据/外卖.csv"),
        ("../a.csv", "{parent}/a.csv"),
        ("~/a=b.csv", "{home}/a=b.csv"),
        ("~", "{home}"),
        ("/data/train(1).csv", "/data/train(1).csv"),
        ("1e3", "{folder}/1e3"),
    ],
)
def test_paths_are_absolute_from_the_launch_folder(
    typed: str, expected: str, composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    plain = final(composed("dataset=text"), tmp_path, dataset__path=typed, model__weights=typed)
    expected = expected.format(folder=tmp_path, parent=tmp_path.parent, home="/home/me")
    assert plain["dataset"]["path"] == plain["model"]["weights"] == expected
    assert plain["model"]["tokenizer"] is None


def test_every_setting_that_is_a_path_is_made_absolute(composed: Composed, tmp_path: Path) -> None:
    found = set()
    for task in TASKS:
        config = composed(f"task={task}")
        flagged = [leaf[0] for leaf in leaves(config) if is_path(leaf[1], leaf[2])]
        plain = final(config, tmp_path, **{key.replace(".", "__"): "x" for key in flagged})
        for key in flagged:
            assert OmegaConf.select(OmegaConf.create(plain), key) == str(tmp_path / "x"), key
        found.update(flagged)
    assert found >= {"dataset.path", "model.weights", "model.tokenizer", "task.run"}


def test_resume_is_a_word_or_a_folder(composed: Composed, tmp_path: Path) -> None:
    for typed, expected in (("auto", "auto"), ("never", "never"), ("runs/x", str(tmp_path / "runs" / "x"))):
        assert final(composed(), tmp_path, task__resume=typed)["task"]["resume"] == expected


def test_what_is_recorded_and_how_it_started_is_not_in_the_digest(composed: Composed, tmp_path: Path) -> None:
    same = digest(final(composed(), tmp_path))
    assert len(same) == 12
    assert digest(final(composed(), tmp_path)) == same
    assert digest(final(composed(), tmp_path, tracking__run_name="你好", tracking__enabled=False)) == same
    assert digest(final(composed(), tmp_path, task__resume="never")) == same
    assert digest(final(composed("task=pretrain", "model=tiny_7b"), tmp_path)) == same
    # the default, named: the same number by another way
    named = {"task__optimizer__lr": composed().model.recipes.pretrain.lr}
    assert digest(final(composed(), tmp_path, **named)) == same


def test_one_file_named_in_two_ways_has_one_digest(composed: Composed, tmp_path: Path) -> None:
    digests = {
        digest(final(composed("dataset=text"), folder, dataset__path=typed))
        for folder, typed in (
            (tmp_path, "a.txt"),
            (tmp_path / "x", "../a.txt"),
            (Path("/"), f"{tmp_path}/a.txt"),
        )
    }
    assert len(digests) == 1


def test_any_number_changes_the_digest(composed: Composed, tmp_path: Path) -> None:
    base = digest(final(composed(), tmp_path))
    changed: dict[str, str] = {}
    for key, parent, name, _ in leaves(composed()):
        value = parent[name]
        if (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and not key.startswith(("tracking.", "launch."))
        ):
            config = composed()
            OmegaConf.update(config, key, value + 1)
            changed[key] = digest(finalize(config, tmp_path))
            assert changed[key] != base, key
    assert len(changed) > 40
    assert len(set(changed.values())) == len(changed)


@pytest.mark.parametrize("task", TASKS)
def test_resolved_yaml_reads_back_typed(task: str, composed: Composed, tmp_path: Path) -> None:
    required = ("task.a=x", "task.b=y") if task == "compare" else ()
    config = composed(f"task={task}", "hardware=2cpu", *required)
    texts = {"tracking__run_name": "1e3", "tracking__experiment": "null ", "model__name": "007"}
    plain = final(config, tmp_path, **texts, tracking__uri="你好,世界: #1", seed=2**63 - 1)
    file = tmp_path / "resolved.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(plain)), encoding="utf-8")
    typed = read(file)
    assert isinstance(typed.model, ModelConfig)
    assert isinstance(typed.task, TASKS[task])
    assert typed.model.position is Position.rope
    assert (typed.tracking.run_name, typed.tracking.experiment, typed.model.name) == ("1e3", "null ", "007")
    assert (typed.tracking.uri, typed.seed) == ("你好,世界: #1", 2**63 - 1)
    assert OmegaConf.to_container(OmegaConf.structured(typed), enum_to_str=True) == plain
    if isinstance(typed.task, PretrainConfig):
        assert typed.task.schedule.kind is Schedule.cosine
        assert isinstance(typed.task.optimizer.lr, float)
    elif isinstance(typed.task, SyncConfig):
        assert typed.task.run is None
    elif isinstance(typed.task, DoctorConfig):
        assert typed.task.micro_batch == 1
    elif isinstance(typed.task, PlanConfig):
        assert typed.task.global_batch == 8
    elif isinstance(typed.task, CompareConfig):
        assert (typed.task.a, typed.task.about_b.log_every, typed.task.tolerances.loss) == ("x", 1, 0.02)
    elif isinstance(typed.task, ConvertConfig):
        assert typed.task.format is Format.hf
    elif isinstance(typed.task, GenerateConfig):
        assert typed.task.format is Prompting.chat
    elif isinstance(typed.task, EvaluateConfig):
        assert typed.task.models is None
    else:
        assert task == "prepare"
