"""Each relation between keys: told where it is broken, with the value and what would work; else silent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.weights.folders import weights_for_the_door

Checked = Callable[..., list[str]]
TEXT = {"dataset.path": "a.txt"}
CONVERT = ("task=convert", {"task.source": "weights", "task.target": "new/target"})
OWN_SHAPE = {"model.hidden_size": 32, "model.intermediate_size": 64, "model.num_heads": 4}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with data, tokenizers, weights and a run."""
    (tmp_path / "数据").mkdir()
    for name in (
        "a.txt",
        "a.csv",
        "a.parquet",
        "a.json",
        "数据/外卖.csv",
        "own.model",
        "store.bin",
        "store.idx",
        "half.bin",
    ):
        (tmp_path / name).write_text("x")
    for folder, content in (("run", "run.json"), ("weights", "a.safetensors"), ("pickled", "a.bin")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / content).write_text("{}")
    (tmp_path / "weights" / "tokenizer.model").write_text("x")
    weights_for_the_door(tmp_path / "weights")
    weights_for_the_door(tmp_path / "weights_13b", position="alibi")
    (tmp_path / "shards" / "mp_rank_00").mkdir(parents=True)
    shutil.copytree(tmp_path / "weights", tmp_path / "led_out")
    index = {"weight_map": {"lm_head.weight": "../weights/a.safetensors"}}
    (tmp_path / "led_out" / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize(
    ("groups", "values", "key", "remedy"),
    [
        # the model
        ((), {"model.num_heads": 7}, "model.num_heads=7: does not divide model.hidden_size=256", "; 8 would"),
        ((), {"model.num_heads": 256}, "model.num_heads=256: gives heads of 1,", "even size; 128 would"),
        ((), {"model.hidden_size": 255}, "model.num_heads=8: does not divide", "none does"),
        (
            (),
            {"dataset.sequence_length": 5000},
            "dataset.sequence_length=5000: the model was made for",
            "model.max_positions=4096",
        ),
        # steps and schedule
        ((), {"task.epochs": 2}, "task.steps, task.epochs: both are set", "set one to null"),
        ((), {"task.steps": None}, "task.steps, task.epochs: neither is set", "set one"),
        (
            (),
            {"task.schedule.warmup_steps": 3},
            "task.schedule.warmup_steps, task.schedule.warmup_fr",
            "to null",
        ),
        (
            (),
            {"task.steps": 5, "task.schedule.warmup_steps": 6, "task.schedule.warmup_fraction": None},
            "task.schedule.warmup_steps=6: more than",
            "task.steps=5",
        ),
        (
            (),
            {"task.optimizer.lr": 0.001, "task.schedule.min_lr": 0.1},
            "task.schedule.min_lr=0.1: above",
            "task.optimizer.lr=0.001",
        ),
        ((), {"task.resume": "weights"}, "task.resume=weights: is no run folder", "auto, or never"),
        ((), {"task.resume": "x" * 300}, "is no run folder", "auto, or never"),
        # devices and batch
        (
            ("hardware=2cpu", "parallelism=single"),
            {},
            "parallelism.replicate=1: hardware.num_devices=2 needs 2",
            "parallelism=ddp",
        ),
        ((), {"parallelism.replicate": 0}, "parallelism.replicate=0: hardware.num_devices=1", "single"),
        (
            ("hardware=8cpu", "parallelism=tp4"),
            {},
            "parallelism.tensor=4: hardware.num_devices=8: the degrees come to 4",
            "parallelism.replicate=2",
        ),
        (
            ("hardware=8cpu", "parallelism=zero3"),
            {"parallelism.tensor": 3},
            "parallelism.tensor=3: hardware.num_devices=8: the degrees come to 3, which does not",
            "nearest choice: parallelism.tensor=4",
        ),
        (
            ("hardware=8cpu",),
            {"parallelism.shard": -1},
            "parallelism.replicate=-1, parallelism.shard=-1: hardware.num_devices=8: only one degree",
            "parallelism.replicate=8 parallelism.shard=1",
        ),
        (
            ("model=tiny_13b", "hardware=8cpu", "parallelism=tp"),
            {"hardware.num_devices": 16, "model.vocab_size": 1000, "dataset.sequence_length": 256},
            "parallelism.tensor=16: does not divide model.num_heads=24",
            "nearest choice: parallelism.",
        ),
        (
            ("hardware=4cpu", "parallelism=tp"),
            {"dataset.sequence_length": 126},
            "parallelism.tensor=4: does not divide dataset.sequence_length=126; parallelism.seq",
            "parallelism.sequence_parallel=false",
        ),
        (
            ("hardware=8cpu", "parallelism=tp"),
            {"model.vocab_size": 17},
            "parallelism.tensor=8: leaves some ranks nothing of model.vocab_size=17",
            "nearest choice: parallelism.",
        ),
        (
            ("hardware=8cpu", "parallelism=tp"),
            {"model.intermediate_size": 9},
            "parallelism.tensor=8: leaves some ranks nothing of model.intermediate_size=9",
            "nearest choice: parallelism.",
        ),
        (
            ("hardware=4cpu", "parallelism=pp4"),
            {},
            "parallelism.pipeline=4: model.num_layers=2 leaves stages without a layer",
            "nearest choice: parallelism.",
        ),
        (
            ("hardware=2cpu", "parallelism=pp2"),
            {"task.micro_batch": 8},
            "parallelism.pipeline=2: a step has 1 micro batch a data rank, fewer than stages",
            "task.micro_batch=4 would do",
        ),
        (
            ("hardware=8cpu", "parallelism=pp2_zero2"),
            {"task.global_batch": 4},
            "parallelism.pipeline=2: a step has 1 micro batch a data rank, fewer than stages",
            "task.global_batch=8 would do",
        ),
        (
            (),
            {"parallelism.sequence_parallel": True},
            "parallelism.sequence_parallel=true: tensor-parallel ranks share",
            "parallelism=tp",
        ),
        (
            ("hardware=2cpu",),
            {"task.global_batch": 7},
            "task.global_batch=7: not a multiple of 2 data-parallel ranks = 2",
            "8 would be",
        ),
        (
            ("hardware=8cpu",),
            {"task.global_batch": 16, "task.micro_batch": 3},
            "task.global_batch=16: not a multiple of 8 data-parallel ranks x task.micro_batch=3 = 24",
            "24 would be",
        ),
        (
            (),
            {"hardware.peak_tflops": 1.5},
            "hardware.peak_tflops, hardware.peak_name",
            "set both or neither",
        ),
        # data
        ((), TEXT, "dataset.path=a.txt: dataset=embedded reads", "use dataset=text"),
        (("dataset=text",), {}, "dataset.path: no value", "dataset.path=FILE"),
        (
            ("dataset=text",),
            {"dataset.path": "数据/外买.csv"},
            "dataset.path=数据/外买.csv: no such",
            "外卖.csv",
        ),
        (("dataset=text",), {"dataset.path": "data/a.csv"}, "no such file", "data does not exist"),
        (
            ("dataset=text",),
            {"dataset.path": "weights"},
            "dataset.path=weights: none of the",
            ".parquet, .csv, .jsonl, .txt can",
        ),
        (
            ("dataset=text",),
            {"dataset.path": "a.json"},
            "dataset.path=a.json: cannot be read",
            ".parquet, .csv",
        ),
        (("dataset=text",), {"dataset.path": "a.csv"}, "dataset.column: no value", "dataset.column=text"),
        (("dataset=text",), {"dataset.path": "数据/*"}, "dataset.column: no value", "外卖.csv"),
        (("dataset=text",), {"dataset.path": "*.jsonl"}, "dataset.path=*.jsonl: no file matches", ""),
        (("dataset=text",), {"dataset.path": "b.bin"}, "dataset.path=b.bin: no such file", ""),
        (("dataset=text",), {"dataset.path": "half.bin"}, "there is no half.idx beside it", "one name"),
        (
            ("dataset=text",),
            {"dataset.path": "store.idx", "dataset.append_eos": True},
            "dataset.append_eos=True: dataset.path=store.idx is a token store",
            "leave the key out",
        ),
        ((), {"dataset.split": [1, 1]}, "dataset.split=[1, 1]: three numbers", "training, evaluation, test"),
        ((), {"dataset.split": [0, 1, 1]}, "dataset.split=[0, 1, 1]", "the first above 0"),
        # files of the model
        (
            (),
            {"model.tokenizer": "pickled"},
            "model.tokenizer=pickled: this folder holds no",
            "tokenizer.model",
        ),
        (
            (),
            {"model.tokenizer": "own.modle"},
            "model.tokenizer=own.modle: no such file",
            "own.model; Baichuan2",
        ),
        ((), {"model.weights": "weigths"}, "model.weights=weigths: no such folder", "/weights"),
        ((), {"model.weights": "pickled"}, "model.weights=pickled: holds no weights", "pytorch_model*.bin"),
        (
            (),
            {"model.weights": "weights", **OWN_SHAPE, "model.intermediate_size": 688, "model.num_layers": 3},
            "model.weights=weights: is not of model=tiny_7b: intermediate_size is 64 in the folder, "
            "model.intermediate_size is 688; num_hidden_layers is 2 in the folder",
            "model.num_layers is 3",
        ),
        ((), {"model.weights": "led_out"}, "names a file outside of itself", "'../weights/a.safetensors'"),
        # a conversion
        (CONVERT, {"task.source": None}, "task.source: no value", "task.source=FOLDER"),
        (CONVERT, {"task.target": None}, "task.target: no value", "task.target=FOLDER"),
        (CONVERT, {"task.source": "weigths"}, "task.source=weigths: no such folder", "/weights"),
        (CONVERT, {"task.source": "数据"}, "task.source=数据: holds no weights", "mp_rank_XX"),
        (CONVERT, {"task.source": "led_out"}, "names a file outside of itself", "'../weights/a.safetensors'"),
        (CONVERT, {"task.target": "run"}, "task.target=run: exists already", "name another"),
        (CONVERT, {"task.target": "weights/x"}, "task.target=weights/x: lies inside task.source", "beside"),
        (CONVERT, {"task.target": "a.txt/x"}, "task.target=a.txt/x: ", "is no folder that can be written to"),
        (CONVERT, {"task.tensor": 2}, "task.tensor=2: belongs to task.format=megatron", "leave the key out"),
        (
            CONVERT,
            {"task.format": "megatron", "task.tensor": 8, "task.vocab_divisible_by": 1},
            "task.tensor=8: does not divide num_heads=4",
            "of the source",
        ),
        (
            CONVERT,
            {"task.format": "megatron", "task.pipeline": 4},
            "task.pipeline=4: does not divide num_layers=2",
            "of the source",
        ),
        (
            CONVERT,
            {"task.format": "megatron", "task.vocab_divisible_by": 1000},
            "task.vocab_divisible_by=1000: pads the 256 rows of the vocabulary to 1000",
            "less would do",
        ),
        (
            CONVERT,
            {"task.source": "weights_13b", "task.format": "llama"},
            "task.format=llama: the source is of the 13B kind",
            "task.format=hf or megatron",
        ),
        # names, tracker
        ((), {"task.name": "sync"}, "task.name=sync: names the code that runs", "task=..."),
        ((), {"model.name": "a/b"}, "model.name=a/b: becomes part of a folder's name", "letters, digits"),
        ((), {"hardware.name": ".."}, "hardware.name=..: becomes part of a folder's name", "letters, digits"),
        ((), {"tracking.uri": "./mlruns"}, "tracking.uri=./mlruns: not an address", "sqlite:///mlflow.db"),
        # values that only other values make wrong
        ((), {"model.num_layers": "${seed}", "seed": 0}, "model.num_layers=0", "must be at least 1"),
        ((), {"seed": "${nope}"}, "seed=${nope}: does not resolve", "'nope' not found"),
        ((), {"seed": "${model.name}"}, "seed=${model.name}: does not resolve", "could not be converted"),
        ((), {"task.steps": "???"}, "task.steps: no value", "task.steps=..."),
    ],
)
def test_a_broken_relation_names_value_and_remedy(
    checked: Checked,
    files: Path,
    groups: tuple[str | dict[str, object], ...],
    values: dict[str, object],
    key: str,
    remedy: str,
) -> None:
    (problem,) = checked(*groups, values)
    assert key in problem
    assert remedy in problem


@pytest.mark.parametrize(
    ("groups", "values"),
    [
        ((), {}),
        ((), {"model.num_heads": 128}),
        ((), {"model.num_heads": 256, "model.position": "alibi"}),
        ((), {"dataset.sequence_length": 4096}),
        ((), {"task.steps": None, "task.epochs": 0.5}),
        ((), {"task.schedule.warmup_steps": 3, "task.schedule.warmup_fraction": None}),
        ((), {"task.schedule.warmup_steps": None, "task.schedule.warmup_fraction": None}),
        ((), {"task.optimizer.lr": 0.1, "task.schedule.min_lr": 0.1}),
        ((), {"task.resume": "never"}),
        ((), {"task.resume": "run"}),
        ((), {"parallelism.replicate": -1}),
        (("hardware=2cpu", "parallelism=single"), {"parallelism.replicate": 2}),
        (("parallelism=tp",), {}),
        (("hardware=8cpu", "parallelism=tp4"), {"parallelism.shard": -1}),
        (("hardware=4cpu", "parallelism=tp"), {"model.vocab_size": 18}),
        (("hardware=4cpu", "parallelism=tp2_pp2"), {"task.micro_batch": 4}),
        (("hardware=8cpu", "parallelism=tp2_pp2_dp2"), {"model.num_layers": 3}),
        (("hardware=8cpu",), {"task.global_batch": 48, "task.micro_batch": 3}),
        ((), {"hardware.peak_tflops": 1.5, "hardware.peak_name": "bf16 dense"}),
        (("dataset=text",), TEXT),
        (("dataset=text",), {"dataset.path": "a.csv", "dataset.column": "text"}),
        (("dataset=text",), {"dataset.path": "./数据/../数据/外卖.csv", "dataset.column": "review"}),
        (("dataset=text",), {"dataset.path": "*.txt"}),
        (("dataset=text",), {"dataset.path": "数据", "dataset.column": "review"}),
        (("dataset=text",), {"dataset.path": "store.bin"}),
        (("dataset=alpaca",), {"dataset.path": "store.idx"}),
        ((), {"dataset.split": [1, 0, 0]}),
        ((), {"model.tokenizer": "weights"}),
        ((), {"model.tokenizer": "own.model"}),
        ((), {"model.weights": "weights", **OWN_SHAPE}),
        ((), {"model.weights": "shards"}),
        (CONVERT, {}),
        (CONVERT, {"task.format": "llama", "task.dtype": "fp16"}),
        (
            CONVERT,
            {"task.format": "megatron", "task.tensor": 4, "task.pipeline": 2, "task.vocab_divisible_by": 64},
        ),
        (CONVERT, {"task.source": "shards", "task.format": "megatron", "task.tensor": 8}),
        ((), {"model.name": "百川-2.7b"}),
        ((), {"tracking.uri": "sqlite:///x.db"}),
        ((), {"tracking.uri": "http://host:5000"}),
        ((), {"tracking.uri": "./mlruns", "tracking.enabled": False}),
        ((), {"model.num_layers": "${seed}", "seed": 1}),
        (("task=sync",), {}),
    ],
)
def test_a_right_relation_is_not_spoken_of(
    checked: Checked, files: Path, groups: tuple[str | dict[str, object], ...], values: dict[str, object]
) -> None:
    assert checked(*groups, values) == []


def test_every_broken_relation_is_told(checked: Checked) -> None:
    wrong = {
        "model.num_heads": 7,
        "task.epochs": 1,
        "dataset.path": "x",
        "tracking.uri": "x",
        "model.weights": "x",
    }
    problems = checked("hardware=2cpu", "parallelism=single", wrong)
    assert len(problems) == 6


def test_a_home_folder_is_found(checked: Checked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.txt").write_text("x")
    assert checked("dataset=text", {"dataset.path": "~/mine.txt"}) == []
    (problem,) = checked("dataset=text", {"dataset.path": "~/nine.txt"})
    assert str(tmp_path / "home" / "mine.txt") in problem
    (problem,) = checked("dataset=text", {"dataset.path": "~nobody/x.txt"})
    assert "no such file" in problem


def test_the_address_of_the_environment_is_checked(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///somewhere")
    (problem,) = checked()
    assert problem.startswith("MLFLOW_TRACKING_URI=file:///somewhere: not an address")
    assert checked({"tracking.uri": "sqlite:///x.db"}) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert checked() == []


def test_a_file_that_may_not_be_read(checked: Checked, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may read everything, so the system's answer is replaced
    monkeypatch.setattr("bc2exp.config.text_files.os.access", lambda path, mode: Path(path).name != "a.txt")
    (problem,) = checked("dataset=text", TEXT)
    assert problem == "dataset.path=a.txt: may not be read (permissions)"


@pytest.mark.parametrize(
    ("groups", "values"),
    [
        (("hardware=4cpu", "parallelism=pp4"), {}),
        (("hardware=8cpu", "parallelism=tp8"), {"model.num_heads": 4}),
        (("hardware=8cpu", "parallelism=tp8"), {"model.vocab_size": 9}),
        (("hardware=8cpu", "parallelism=tp4_zero2"), {"parallelism.shard": 3}),
    ],
)
def test_the_nearest_choice_is_one_that_is_not_refused(
    checked: Checked, groups: tuple[str | dict[str, object], ...], values: dict[str, object]
) -> None:
    (problem,) = checked(*groups, values)
    words = problem.partition("nearest choice: ")[2].split()
    chosen = {key: int(value) for key, _, value in (word.partition("=") for word in words)}
    assert checked(*groups, {**values, **chosen}) == []
