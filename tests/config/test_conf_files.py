"""The YAML files: all compose; a typo in one is refused; a user's own are found; who overrides whom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from omegaconf import DictConfig, OmegaConf

from bc2exp.config.preflight import Preflight, preflight
from bc2exp.config.root import GROUPS
from bc2exp.config.roots import data_root
from bc2exp.embedded import REVIEWS
from tests.weights.folders import weights_for_the_door

CONF = data_root() / "conf"
FILES = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml"))
EXPERIMENTS = [
    ("experiments", f"{file.parent.name}/{file.stem}")
    for file in (data_root() / "experiments").glob("*/*.yaml")
]
SITE = TemporaryDirectory()
HARDWARE = [name for group, name in FILES if group == "hardware"]
NEEDED = {
    name: ["dataset.path=mine.txt"]
    for name in ("text", "alpaca", "waimai_10k", "classification", "instruction", "conversation")
}
NEEDED |= {f"modelzoo_waimai/{name}": [f"dataset.path={REVIEWS}"] for name in ("recipe", "cpu_study")}
NEEDED["compare"] = ["task.a=mine.txt", "task.b=mine.txt"]
NEEDED["convert"] = [f"task.source={weights_for_the_door(Path(SITE.name) / 'weights')}", "task.target=target"]
"""What a user has to name with a choice, as no file can."""
DEVICES = {
    "hsdp": 4,
    "pp2": 2,
    "pp2_zero2": 4,
    "pp4": 4,
    "tp2": 2,
    "tp2_ddp": 4,
    "tp2_pp2": 4,
    "tp2_pp2_dp2": 8,
    "tp2_zero3": 4,
    "tp4": 4,
    "tp4_zero2": 8,
    "tp4_zero3": 8,
    "tp8": 8,
    "tp8_pp2_ddp": 16,
    "tp8_zero2": 16,
}
"""Devices for a layout that one does not do for."""
NEEDED |= {name: [f"hardware.num_devices={number}", "model.num_layers=4"] for name, number in DEVICES.items()}

# facts/recipes.md: ModelLink's pretraining on 8 NPUs
PRETRAIN = {
    "sequence_length": 4096,
    "global_batch": 32,
    "micro_batch": 4,
    "steps": 1000,
    "epochs": None,
    "lr": 1e-6,
    "min_lr": 1e-8,
    "schedule": "cosine",
    "warmup_steps": None,
    "warmup_fraction": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
    "init_std": 0.01,
    "eval_every": 1000,
    "save_every": 1000,
}
# facts/recipes.md: ModelZoo's fine-tuning on waimai_10k, 8 cards x micro batch 1 x accumulation 4
FINETUNE = {
    "sequence_length": 1024,
    "global_batch": 32,
    "micro_batch": 1,
    "steps": None,
    "epochs": 1.0,
    "lr": 1e-5,
    "schedule": "cosine",
    "warmup_steps": None,
    "warmup_fraction": 0.03,
    "weight_decay": 0.0,
}
# What the sources leave to the defaults of their optimizer and scheduler.
PRETRAIN_DEFAULTS = {"eps": 1e-8}
FINETUNE_DEFAULTS = {
    "min_lr": 0.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "clip_norm": 1.0,
    "init_std": 0.02,
    "eval_every": None,
    "save_every": None,
}
SHAPES = {
    "baichuan2_7b": (4096, 11008, 32, 32, "rope", 125696, 4096),
    "baichuan2_13b": (5120, 13696, 40, 40, "alibi", 125696, 4096),
}


def plain(config: DictConfig, *keys: str) -> dict:
    """The named parts (all: no name) as data, interpolations unresolved."""
    found = OmegaConf.to_container(config, enum_to_str=True)
    assert isinstance(found, dict)
    return {key: value for key, value in found.items() if not keys or key in keys}


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def run(folder: Path, *words: str, sweep: bool = False) -> Preflight:
    return preflight(words, sweep=sweep, folder=folder)


def test_there_are_files_in_every_group() -> None:
    assert {group for group, _ in FILES} == set(GROUPS)


@pytest.mark.parametrize(("group", "name"), [*FILES, *EXPERIMENTS])
def test_every_file_composes(group: str, name: str, untouched: Path) -> None:
    result = run(untouched, f"{group}={name}", *NEEDED.get(name, []))
    assert result.problems == []
    assert group == "experiments" or result.jobs[0][group].name == name


@pytest.mark.parametrize(("group", "name"), FILES)
def test_the_first_default_of_every_file_is_its_schema_or_a_file_that_has_it(group: str, name: str) -> None:
    first = OmegaConf.load(CONF / group / f"{name}.yaml").defaults[0]
    if first not in ("schema", f"/{group}/schema@{group}", f"{name}_schema", f"/task/{name}_schema@task"):
        assert (group, first) in FILES


@pytest.mark.parametrize("model", SHAPES)
def test_the_published_recipes_stand_in_the_model_files(
    model: str, composed: Callable[..., DictConfig]
) -> None:
    found = plain(composed(f"model={model}"))["model"]
    assert found["recipes"]["pretrain"] == PRETRAIN | PRETRAIN_DEFAULTS
    assert found["recipes"]["finetune"] == FINETUNE | FINETUNE_DEFAULTS
    shape = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "position", "vocab_size")
    assert tuple(found[key] for key in (*shape, "max_positions")) == SHAPES[model]
    assert (found["rms_norm_eps"], found["rope_theta"]) == (1e-6, 10000.0)


@pytest.mark.parametrize("model", SHAPES)
def test_the_task_runs_the_published_recipe(model: str, composed: Callable[..., DictConfig]) -> None:
    config = composed(f"model={model}", "dataset=text", "task=pretrain")
    task = OmegaConf.to_container(config.task, resolve=True, enum_to_str=True)
    assert isinstance(task, dict)
    flat = {**task, **task["optimizer"], **task["schedule"], "schedule": task["schedule"]["kind"]}
    expected = {key: value for key, value in PRETRAIN.items() if key != "sequence_length"}
    assert {key: flat[key] for key in expected} == expected
    assert config.dataset.sequence_length == 4096
    assert config.dataset.split == [949, 50, 1]
    assert config.dataset.append_eos is False


@pytest.mark.parametrize("hardware", HARDWARE)
def test_hardware_changes_no_number_of_a_run(hardware: str, composed: Callable[..., DictConfig]) -> None:
    chosen = composed(f"hardware={hardware}")
    default = composed()
    assert chosen.hardware.name == hardware
    for part in set(plain(default)) - {"hardware", "model", "parallelism"}:
        assert plain(chosen, part) == plain(default, part), part
    # with the model and the layout named, nothing but the hardware differs
    named = ("model=tiny_13b", "parallelism=ddp")
    chosen, default = composed(f"hardware={hardware}", *named), composed(*named)
    rest = [str(key) for key in default if key != "hardware"]
    assert plain(chosen, *rest) == plain(default, *rest)


def test_a_hardware_file_chooses_model_and_layout_and_the_command_line_wins(untouched: Path) -> None:
    text = (CONF / "hardware" / "2cpu.yaml").read_text(encoding="utf-8")
    assert "override /model: tiny_7b" in text
    folder = untouched / "hardware"
    write(untouched, "hardware/mine.yaml", text.replace("/model: tiny_7b", "/model: tiny_13b"))
    (job,) = run(untouched, "hardware=mine").jobs
    assert (job.model.name, job.parallelism.name, job.hardware.num_devices) == ("tiny_13b", "ddp", 2)
    (job,) = run(untouched, "hardware=mine", "model=baichuan2_7b").jobs
    assert (job.model.name, job.parallelism.name) == ("baichuan2_7b", "ddp")
    assert "parallelism=ddp" in run(untouched, "parallelism=single", "hardware=mine").problems[0]
    (folder / "mine.yaml").unlink()
    folder.rmdir()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with awkward characters in its path, for files of the user's own."""
    folder = tmp_path / "数据 a=b,{c}'d"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def test_a_users_own_files_are_found(workplace: Path) -> None:
    write(workplace, "dataset/mine.yaml", "defaults: [text, _self_]\nname: mine\npath: a.txt\n")
    write(workplace, "dataset/外卖.yaml", "defaults: [embedded, _self_]\nname: 外卖\n")
    write(workplace, "a.txt", "text")
    write(workplace, "experiments/study/a.yaml", "# @package _global_\nseed: 7\n")
    write(workplace, "experiments/学习率/a.yaml", "# @package _global_\nseed: 8\n")
    (job,) = run(workplace, "dataset=mine", "experiments=study/a").jobs
    assert (job.dataset.name, job.dataset.source.name, job.seed) == ("mine", "file", 7)
    (job,) = run(workplace, "dataset=外卖", "experiments=学习率/a").jobs
    assert (job.dataset.name, job.seed) == ("外卖", 8)
    assert len(run(workplace, "dataset=mine,外卖", "experiments=glob(*/a)", sweep=True).jobs) == 4
    assert ", study/a, 学习率/a" in run(workplace, "experiments=nope/x").problems[0]
    assert "write experiments=study/a" in run(workplace, "study/a").problems[0]


def test_an_experiment_overrides_any_group_and_the_command_line_wins(workplace: Path) -> None:
    write(
        workplace,
        "experiments/study/all.yaml",
        "# @package _global_\ndefaults:\n  - override /hardware: 2cpu\n  - override /model: tiny_13b\n"
        "  - override /dataset: embedded_reviews\n  - override /task: pretrain\n  - _self_\n"
        "task:\n  optimizer:\n    lr: 0.5\nhardware:\n  precision: bf16\n",
    )
    (job,) = run(workplace, "experiments=study/all").jobs
    assert (job.hardware.name, job.model.name, job.dataset.name) == ("2cpu", "tiny_13b", "embedded_reviews")
    assert (job.parallelism.name, job.hardware.precision.name, job.task.optimizer.lr) == ("ddp", "bf16", 0.5)
    (job,) = run(workplace, "experiments=study/all", "hardware=4cpu", "task.optimizer.lr=0.25").jobs
    assert (job.hardware.name, job.task.optimizer.lr) == ("4cpu", 0.25)


HEAD = "# @package _global_\n"
BROKEN = [
    (
        "dataset/mine.yaml",
        "defaults: [schema, _self_]\npth: x\n",
        ["dataset.pth: no such key", "dataset.path"],
    ),
    ("dataset/mine.yaml", "name: mine\npth: x\n", ["dataset.pth: no such key", "dataset.path"]),
    (
        "dataset/mine.yaml",
        "defaults: [embedded]\nsplit: many\n",
        ["dataset.split: must be a list of integers"],
    ),
    ("dataset/mine.yaml", "name: [a\n", ["line 2: is not YAML"]),
    ("dataset/mine.yaml", "name: a\nname: b\n", ["line 2: is not YAML: found duplicate key name"]),
    (
        "dataset/mine.yaml",
        "defaults: [nope, _self_]\n",
        ["asks for dataset=nope", "there are alpaca, classification"],
    ),
    ("dataset/mine.yaml", "- a\n", ["dataset/mine"]),
    ("dataset/mine.yaml", "defaults: 3\n", ["dataset=mine: Invalid defaults list"]),
    (
        "task/mine.yaml",
        "steps: 3\n",
        ["task.steps: belongs to task=finetune,pretrain; name it in the defaults"],
    ),
    ("experiments/s/a.yaml", HEAD + "task:\n  optimiser:\n    lr: 1\n", ["task.optimiser", "task.optimizer"]),
    ("experiments/s/a.yaml", "seed: 1\n", ["its first line must be `# @package _global_`"]),
    (
        "experiments/s/a.yaml",
        HEAD + "defaults:\n  - override /hardware: 3cpu\n",
        ["hardware=3cpu", "2cpu, 4cpu"],
    ),
    (
        "experiments/s/a.yaml",
        HEAD + "defaults:\n  - override /hardwar: cpu\n",
        ["hardwar: no such", "hardware"],
    ),
    ("experiments/s/a.yaml", HEAD + "defaults:\n  - /hardware: 2cpu\n", ["Multiple values for hardware"]),
    ("experiments/s/a.yaml", HEAD + "hydra:\n  mode: MULTIRUN\n", ["hydra.mode", "-m key=a,b"]),
    ("experiments/s/a.yaml", HEAD + "hydra:\n  sweeper:\n    params:\n      seed: 1,2\n", ["-m key=a,b"]),
]


@pytest.mark.parametrize(("name", "text", "told"), BROKEN)
def test_a_mistake_in_a_file_is_refused_beside_one_of_the_command_line(
    name: str, text: str, told: list[str], workplace: Path
) -> None:
    write(workplace, name, text)
    group, _, choice = name.removesuffix(".yaml").partition("/")
    result = run(workplace, f"{group}={choice}", "tracking.uir=x")
    in_file, typed = result.problems
    assert f"{group}={choice}" in in_file or str(workplace / name) in in_file
    for part in told:
        assert part in in_file
    assert typed == "tracking.uir=x: no such key; nearest: tracking.uri"
    assert [path.name for path in workplace.rglob("*.*")] == [Path(name).name]


def test_a_mistake_in_a_file_is_refused_in_a_sweep(workplace: Path) -> None:
    write(workplace, "dataset/mine.yaml", "defaults: [schema, _self_]\npth: x\n")
    (problem,) = run(workplace, "dataset=embedded,mine", sweep=True).problems
    assert (
        problem == f"{workplace / 'dataset' / 'mine.yaml'}: dataset.pth: no such key; nearest: dataset.path"
    )


def test_a_value_in_a_file_is_judged_like_a_typed_one(workplace: Path) -> None:
    text = "defaults: [embedded]\nname: mine\nsequence_length: -1\nsplit: [1, 1]\n"
    write(workplace, "dataset/mine.yaml", text)
    assert run(workplace, "dataset=mine").problems == ["dataset.sequence_length=-1: must be at least 2"]
    write(workplace, "dataset/mine.yaml", "source: embedded_corpus\n")
    told = [problem.partition(":")[0] for problem in run(workplace, "dataset=mine").problems]
    assert told == ["dataset.name", "dataset.sequence_length"]


def test_a_file_in_another_encoding_is_refused(workplace: Path) -> None:
    (workplace / "dataset").mkdir()
    (workplace / "dataset" / "mine.yaml").write_bytes("name: 外卖\n".encode("gbk"))
    (problem,) = run(workplace, "dataset=mine").problems
    assert problem == f"{workplace / 'dataset' / 'mine.yaml'}: is not UTF-8; save the file as UTF-8"


def test_a_file_that_would_be_passed_over_is_refused(workplace: Path) -> None:
    write(workplace, "dataset/embedded.yaml", "defaults: [text]\n")
    (problem,) = run(workplace, "dataset=embedded").problems
    assert problem.endswith(f"and not {workplace / 'dataset' / 'embedded.yaml'}; give your file another name")


def test_a_file_that_breaks_every_composition_is_refused(workplace: Path) -> None:
    # a schema of the user's own hides the package's
    write(workplace, "dataset/schema.yaml", "nonsense: [\n")
    for words in ([], ["model=tiny_13b", "task.stps=1"]):
        told = run(workplace, *words).problems
        assert told
        assert all("dataset/schema.yaml, line 2: is not YAML" in problem for problem in told)
