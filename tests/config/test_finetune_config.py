"""task=finetune at the door: the published recipe field by field, and what a data set lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from bc2exp.config.preflight import preflight

# facts/recipes.md, "ModelZoo fine-tuning": what its options come to, under our keys. Rows of the table in the
# guide; eps, betas, clipping and the floor of the rate are the defaults of its optimizer and scheduler.
RECIPE = {
    "task.recipe": "finetune",
    "task.steps": None,
    "task.epochs": 1.0,
    "task.global_batch": 32,
    "task.micro_batch": 1,
    "task.optimizer.lr": 1e-5,
    "task.optimizer.weight_decay": 0.0,
    "task.optimizer.beta1": 0.9,
    "task.optimizer.beta2": 0.999,
    "task.optimizer.eps": 1e-8,
    "task.optimizer.clip_norm": 1.0,
    "task.schedule.kind": "cosine",
    "task.schedule.min_lr": 0.0,
    "task.schedule.warmup_steps": None,
    "task.schedule.warmup_fraction": 0.03,
    "task.log_every": 1,
    "task.eval_every": None,
    "task.save_every": None,
    "task.best_metric": None,
    "hardware.precision": "bf16",
    "hardware.num_devices": 8,
    "parallelism.shard": -1,
    "parallelism.zero_stage": 2,
    "parallelism.tensor": 1,
    "parallelism.pipeline": 1,
    "parallelism.replicate": 1,
    "model.name": "baichuan2_7b",
    "dataset.name": "waimai_10k",
    "dataset.sequence_length": 1024,
    "dataset.kind": "classification",
    "dataset.format": "modelzoo",
    "dataset.prompt": "{review} -> ",
    "dataset.text_column": "review",
    "dataset.label_column": "label",
    "dataset.label_words": {"1": "积极", "0": "消极"},
    "dataset.num_train": 10_000,
    "dataset.num_eval": None,
    "dataset.over_long": "drop",
    "dataset.packing": "packed",
}


def selected(config: DictConfig, keys) -> dict:
    plain = OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True))
    found = {key: OmegaConf.select(plain, key, throw_on_missing=True) for key in keys}
    return {
        key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        for key, value in found.items()
    }


def test_the_published_recipe(composed: Callable[..., DictConfig]) -> None:
    config = composed("task=finetune", "hardware=8npu", "dataset=waimai_10k")
    assert selected(config, RECIPE) == RECIPE


def test_the_recipe_s_experiment_is_the_recipe_with_recomputation(
    composed: Callable[..., DictConfig],
) -> None:
    config = composed("experiments=modelzoo_waimai/recipe")
    assert selected(config, RECIPE) == RECIPE
    assert config.parallelism.recompute.name == "full"
    assert config.hardware.name == "8npu"


def test_one_command_is_enough_and_the_command_line_wins(composed: Callable[..., DictConfig]) -> None:
    config = composed("task=finetune")
    assert (config.dataset.name, config.parallelism.name) == ("embedded_reviews", "zero2")
    config = composed("task=finetune", "hardware=2cpu", "parallelism=ddp", "dataset=conversation")
    assert (config.dataset.name, config.parallelism.name) == ("conversation", "ddp")
    assert config.dataset.format.name == "official"


def told(folder: Path, *words: str) -> list[str]:
    return preflight(["task=finetune", *words], sweep=False, folder=folder).problems


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dataset=embedded"], "task=finetune: dataset=embedded holds plain text, no questions and answers"),
        (["dataset.text_column=null"], "dataset.text_column: no value; dataset.kind=classification needs it"),
        (["dataset.label_column=null"], "dataset.label_column: no value"),
        (["dataset.prompt=null"], "dataset.prompt: no value"),
        (
            ["dataset.prompt=good?"],
            "dataset.prompt=good?: names no column; write one in braces, as in {review}",
        ),
        (["dataset.prompt='{review'"], "dataset.prompt={review: "),
        (["dataset.prompt='{review!r}'"], "braces hold the name of a column and nothing else"),
        (["dataset.prompt='{review:>9}'"], "braces hold the name of a column and nothing else"),
        (["dataset.prompt='{review[0]}'"], "braces hold the name of a column and nothing else"),
        (["dataset.label_words.1=消极"], "dataset.label_words: 1 and 0 have the word '消极'"),
        (["dataset.label_words.1=' '"], "dataset.label_words: 1 have the word ' '"),
        (["dataset.kind=conversation"], "dataset.turns_column: no value; dataset.kind=conversation needs it"),
        (["dataset.kind=instruction"], "dataset.answer_column: no value; dataset.kind=instruction needs it"),
        (
            ["task.best_metric=eval/loss", "task.eval_every=null"],
            "task.best_metric=eval/loss: needs task.eval_every",
        ),
        (["task.best_metric=eval/f1"], "task.best_metric=eval/f1: must be one of eval/loss"),
        (["dataset.packing=tight"], "dataset.packing=tight: must be one of packed, bucketed, longest, fixed"),
        (["dataset.label_words={1: a}"], "dataset.label_words={1: a}: is a group of keys"),
    ],
)
def test_what_a_data_set_lacks_is_told(untouched: Path, words: list[str], expected: str) -> None:
    assert any(expected in problem for problem in told(untouched, *words)), told(untouched, *words)


def test_conversations_need_the_official_format(untouched: Path) -> None:
    words = ("dataset=conversation", "dataset.path=mine.jsonl")
    (untouched / "mine.jsonl").touch()
    try:
        assert told(untouched, *words) == []
        (problem,) = told(untouched, *words, "dataset.format=modelzoo")
        assert problem.startswith("dataset.format=modelzoo: has one question and one answer")
        (problem,) = told(untouched, *words, "dataset.roles.gpt=user")
        assert problem == "dataset.roles: none is the assistant's"
        problem = told(untouched, *words, "dataset.roles.gpt=bot")[0]
        assert problem.startswith("dataset.roles.gpt=bot: must be one of system, user, assistant")
    finally:
        (untouched / "mine.jsonl").unlink()


def test_files_without_columns_are_refused(untouched: Path) -> None:
    (problem,) = told(untouched, "dataset=waimai_10k", "dataset.path=mine.txt")
    assert "has no columns; .csv, .jsonl and .parquet have" in problem


def test_a_data_set_of_ones_own_needs_a_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_text(
        "defaults: [classification, _self_]\nname: mine\npath: a.csv\ntext_column: text\n"
        'label_column: stars\nlabel_words: {"5": 好, "1": 坏}\nprompt: "{title}: {text}\\n"\n',
        encoding="utf-8",
    )
    (tmp_path / "a.csv").write_text("title,text,stars\n", encoding="utf-8")
    (job,) = preflight(["task=finetune", "dataset=mine"], sweep=False, folder=tmp_path).jobs
    assert job.dataset.label_words == {"5": "好", "1": "坏"}
    assert job.dataset.prompt == "{title}: {text}\n"
    # as plain text, too
    assert preflight(["dataset=mine"], sweep=False, folder=tmp_path).problems == []
    (tmp_path / "dataset" / "mine.yaml").write_text(
        "defaults: [classification, _self_]\nname: mine\npath: a.csv\ntext_column: text\n"
        'label_column: stars\nlabel_words: {5: 好, 1: 坏}\nprompt: "{text}"\n',
        encoding="utf-8",
    )
    (problem,) = preflight(["task=finetune", "dataset=mine"], sweep=False, folder=tmp_path).problems
    assert "mine.yaml" in problem
