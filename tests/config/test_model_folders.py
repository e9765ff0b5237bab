"""Which model a folder means, by what name it goes, and what the door says of folders that hold none."""

from __future__ import annotations

from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from bc2exp.config.load import finalize
from bc2exp.config.model_folders import ModelFolder, find_model_folder, named_models
from bc2exp.config.preflight import preflight


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Published weights, a run with weights, one with checkpoints only, an empty one."""
    for name in ("published", "run/weights", "bare"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    for name in ("published", "run/weights"):
        (tmp_path / name / "tokenizer.model").write_bytes(b"")
    for step in (8, 16):
        for run in ("run", "young"):
            folder = tmp_path / run / "checkpoints" / f"step-{step:08}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")
    for run in ("run", "young", "empty"):
        (tmp_path / run).mkdir(exist_ok=True)
        (tmp_path / run / "resolved.yaml").write_text("{}")
    return tmp_path


def test_what_lies_in_a_folder(site: Path) -> None:
    published = site / "published"
    assert find_model_folder(published, "k") == ModelFolder(published, None, published / "tokenizer.model")
    weights = site / "run" / "weights"
    assert find_model_folder(site / "run", "k") == ModelFolder(weights, None, weights / "tokenizer.model")
    newest = site / "young" / "checkpoints" / "step-00000016"
    assert find_model_folder(site / "young", "k") == ModelFolder(newest, site / "young", None)
    older = site / "run" / "checkpoints" / "step-00000008"
    assert find_model_folder(older, "k") == ModelFolder(older, site / "run", None)
    assert find_model_folder(site / "bare", "k") == ModelFolder(site / "bare", None, None)


def test_folders_without_a_model_are_told_apart(site: Path) -> None:
    stray = site / "elsewhere"
    (site / "young" / "checkpoints" / "step-00000016").rename(stray)
    shards = site / "shards" / "mp_rank_00"
    shards.mkdir(parents=True)
    for name, said in {
        "publishde": f"no such folder; nearest: {site / 'published'}",
        "empty": "this run has left neither weights nor a checkpoint",
        "elsewhere": "is a checkpoint outside of its run",
        "shards": "shards of ModelLink do not say what model they are of",
        ".": "holds no model",
    }.items():
        with pytest.raises(UserError, match=r"^task\.model=x: ") as error:
            find_model_folder(site / name, "task.model=x")
        assert said in str(error.value)


def test_models_go_by_names() -> None:
    assert named_models(None, "tiny_7b") == {"tiny_7b": None}
    assert named_models("/a/run-1", "m") == {"run-1": "/a/run-1"}
    assert named_models("/a/run-1/weights", "m") == {"run-1": "/a/run-1/weights"}
    checkpoint = "/a/run-1/checkpoints/step-00000008"
    assert named_models(checkpoint, "m") == {"run-1-step-00000008": checkpoint}
    assert named_models([None, "/a/x", "/b/x"], "m") == {"m": None, "x": "/a/x", "x-2": "/b/x"}
    assert named_models({"base": None, "tuned": "/a"}, "m") == {"base": None, "tuned": "/a"}


@pytest.mark.parametrize("value", [{}, [], 3, {"a": 3}, ["  "], {"a b": "/a"}, {"a": ["/a"]}])
def test_what_names_no_models_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"no model|is no folder|becomes part of names"):
        named_models(value, "m")


def problems(folder: Path, *words: str) -> list[str]:
    return preflight(words, sweep=False, folder=folder).problems


def test_the_door_knows_what_models_are_named(site: Path) -> None:
    assert problems(site, "task=evaluate", "task.models={base: null, tuned: run}") == []
    assert problems(site, "task=evaluate", "task.models=[run,published]") == []
    assert problems(site, "task=evaluate", "task.models=./run") == []
    assert problems(site, "task=generate", "task.model=young") == []
    (problem,) = problems(site, "task=evaluate", "task.models={base: null, tuned: rnu}")
    assert problem.startswith("task.models.tuned=rnu: no such folder; nearest: ")
    (problem,) = problems(site, "task=evaluate", "task.models=bare")
    assert problem == (
        "task.models=bare: holds no tokenizer.model; name the model's own by model.tokenizer=FILE"
    )
    assert problems(site, "task=evaluate", "task.models=bare", "model.tokenizer=published") == []
    (problem,) = problems(site, "task=evaluate", "task.models=3")
    assert problem.startswith("task.models")
    (problem,) = problems(site, "task=evaluate", "task.models={base")
    assert problem.endswith("must be {name: FOLDER, ...} or [FOLDER, ...] or a FOLDER, or null")


def test_named_folders_become_absolute(site: Path) -> None:
    for typed, meant in {
        "{base: null, tuned: run}": {"base": None, "tuned": str(site / "run")},
        "[run,published]": [str(site / "run"), str(site / "published")],
        "./run": str(site / "run"),
    }.items():
        checked = preflight(["task=evaluate", f"task.models={typed}"], sweep=False, folder=site)
        assert finalize(checked.jobs[0], site)["task"]["models"] == meant


def test_a_folder_of_any_name_is_right_input(site: Path) -> None:
    (site / "run").rename(site / "外卖=1,2")
    checked = preflight(["task=evaluate", "task.models=./外卖=1,2"], sweep=False, folder=site)
    assert checked.problems == []
    assert checked.jobs[0].task.models == "./外卖=1,2"


def test_prompts_of_any_kind_are_right_input(tmp_path: Path) -> None:
    words = ["task=generate", "task.prompts=[你好,世界,'a,b',it's \"x\"=(1)]"]
    checked = preflight(words, sweep=False, folder=tmp_path)
    assert checked.problems == []
    assert list(checked.jobs[0].task.prompts) == ["你好", "世界", "a,b", 'it\'s "x"=(1)']
    for word, said in {
        "task.prompts=你好": "must be a list of texts in square brackets",
        "task.template=hello": "has no {prompt}",
        "task.file=nowhere.txt": "no such file",
        "task.top_p=0": "above 0",
        "task.context=5000": "the model was made for model.max_positions=4096",
    }.items():
        (problem,) = problems(tmp_path, "task=generate", word)
        assert said in problem
    (problem,) = problems(tmp_path, "task=generate", "task.prompt=a", "task.prompts=[b]")
    assert problem == "task.prompt, task.prompts: name one of them"
    (problem,) = problems(tmp_path, "task=generate", "task.format=plain", "task.system=x")
    assert "needs task.format=chat" in problem
