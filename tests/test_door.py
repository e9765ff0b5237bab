"""The door, as a newcomer finds it: wrong input ends with code 2, a sentence that helps, and no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bc2exp import __main__ as door
from bc2exp.launch import sweep_door

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "mlflow", "transformers", "pyarrow", "sentencepiece")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file whose name is awkward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "数据").mkdir()
    for name in ("数据/外卖.csv", "a=b.csv", "train(1).csv", "你好,世界.txt", "1e3.txt", "home.txt"):
        (tmp_path / name).write_text("review\n好\n", encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below a folder with its time and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, b"" if path.is_dir() else path.read_bytes())
        for path in folder.rglob("*")
    }


Refused = Callable[..., str]


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """What a command line is told that must end with code 2 and leave everything as it is."""

    def say(*arguments: str) -> str:
        before = tree(folder)
        try:
            code = door.command(list(arguments))
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        assert code == 2, said
        assert said.out == ""
        assert "Traceback" not in said.err
        assert tree(folder) == before
        return said.err

    return say


TEXT = "dataset=text"
WRONG: list[tuple[str, list[str], list[str]]] = [
    (
        "three typos",
        ["task.stps=1", "modle=tiny", "dataset.pth=x"],
        ["3 mistakes", "nearest: task.steps", "nearest: model\n", "nearest: dataset.path"],
    ),
    (
        "typo, range, shape",
        ["task.stps=1", "seed=-1", "model.num_heads=7"],
        ["3 mistakes", "at least 0", "; 8 would"],
    ),
    (
        "choice",
        ["model=tiny_8b"],
        ["1 mistake;", "model=tiny_8b: no such choice; nearest: tiny_7b; there are"],
    ),
    (
        "choice and typo",
        ["hardware=gpu", "task.stps=1"],
        ["hardware=gpu: no such choice", "nearest: task.steps"],
    ),
    (
        "no choices",
        ["experiments=nope/x", "model=", "task=null", "+dataset=text", "hardware=cpu,2cpu"],
        [
            "5 mistakes",
            "experiments=nope/x: no such",
            "model=: no such",
            "task=null: no such",
            "write dataset=text",
        ],
    ),
    (
        "typo without its consequence",
        ["task.stps=null", "task.epochs=1"],
        ["1 mistake;", "nearest: task.steps"],
    ),
    ("heads", ["model.num_heads=7"], ["model.num_heads=7: does not divide model.hidden_size=256; 8 would"]),
    ("batch", ["hardware=2cpu", "task.global_batch=7"], ["task.global_batch=7", "8 would be"]),
    (
        "file",
        [TEXT, "dataset.path=./数据/外买.csv"],
        ["./数据/外买.csv: no such file or folder; nearest", "外卖.csv"],
    ),
    ("no file", [TEXT], ["dataset.path: no value"]),
    ("twice", ["task.steps=1", "task.steps=2"], ["task.steps: given twice, as 1 and as 2; keep one"]),
    ("another task", ["task=sync", "task.steps=3"], ["task=sync has no such key; task=finetune,pretrain"]),
    (
        "values",
        [
            "task.steps=",
            "tracking.run_name=",
            "seed=一",
            "task.optimizer.lr=nan",
            "task.log_every=1,2",
            "种子=1",
        ],
        [
            "6 mistakes",
            "task.steps=: must be an integer, at least 1, or null",
            "tracking.run_name=: is empty",
            "seed=一: must be an integer",
            "task.optimizer.lr=nan: must be a finite number, above 0",
            "task.log_every=1,2: must be an integer, at least 1 (several values need -m)",
            "种子=1: no such key",
        ],
    ),
    (
        "whole groups",
        ["task.optimizer={lr:1}", "model.recipes=null", "model@model=tiny_7b", "~task.steps"],
        [
            "4 mistakes",
            "task.optimizer.lr=...",
            "recipes=null: is a group",
            "write model=tiny_7b",
            "be deleted",
        ],
    ),
    (
        "no overrides",
        ["sync", "task.steps", "=", "1", ""],
        ["5 mistakes", "write task=sync", "without spaces", "=: has no key", "an empty word: is no override"],
    ),
    (
        "references",
        ["seed=${nope}", "tracking.run_name=${nope}"],
        ["2 mistakes", "seed=${nope}: does not resolve", "name=${nope}: does not resolve"],
    ),
    (
        "half a reference",
        ["seed=${", "tracking.uri=${"],
        ["2 mistakes", "an integer", "must be text, or null"],
    ),
    (
        "bytes",
        ["tracking.run_name=\udcff", "seed=x\ny"],
        ["2 mistakes", "is not UTF-8", "seed=x\\ny: must be"],
    ),
    (
        "hydra's settings",
        ["hydra.run.dr=x", "hydra.mode=MULTIRUN", "hydra.sweep.dir=x", "hydra/launcher=basic", "hydra=x"],
        ["5 mistakes", "these are taken: hydra.run.dir; with -m", "hydra.sweep.dir=x: belongs to a sweep"],
    ),
    ("no folder", ["hydra.run.dir="], ["must be a folder"]),
    ("a file as folder", ["hydra.run.dir=./数据/外卖.csv"], ["外卖.csv is a file, not a folder"]),
    (
        "folder of nothing",
        ["hydra.run.dir=${nope}/x"],
        ["cannot be read (Interpolation key 'nope' not found)"],
    ),
    (
        "sweep with typos",
        ["seed=1,2", "-m", "task.stps=1", "model=tiny_7b,tny_7b", "task.log_every=1,x,-1"],
        ["4 mistakes", "model=tny_7b: no", "nearest: task.steps", "log_every=x: must", "log_every=-1: must"],
    ),
    (
        "sweep that divides nowhere",
        ["--multirun", "hardware=2cpu,4cpu", "task.global_batch=7,9"],
        ["4 mistakes;", "=7: not a multiple of 2", "=9: not a multiple of 4"],
    ),
    ("sweep of tasks", ["-m", "task=pretrain,sync", "task.steps=3"], ["task=sync has no such key"]),
    (
        "sweep syntax",
        ["-m", "model=tiny_7b,", "seed=choice(1,2", "task.log_every=1,,2", "hardware=glob(x*)"],
        [
            "4 mistakes",
            "model=: no such",
            "choice(1,2: must",
            "1,,2: must",
            "hardware=glob(x*): fits none of",
        ],
    ),
    ("interval", ["-m", "task.optimizer.lr=interval(1e-3,1e-2)"], ["needs a sweeper that draws values"]),
    ("too many jobs", ["-m", "seed=range(0,100000000)"], ["more than 1000 jobs"]),
    (
        "hydra's settings in a sweep",
        ["-m", "hydra.run.dir=x", "hydra/sweeper=optuna_", "hydra.sweeper.params.seed=1"],
        ["3 mistakes", "name the sweep's", "hydra/sweeper=optuna_: no such choice"],
    ),
    ("a sweep without a folder", ["sweep.resume=nope"], ["sweep.resume=nope: no such folder"]),
    ("a folder without a sweep", ["sweep.resume=数据"], ["数据: is no sweep's folder (it would hold ledger"]),
    ("one job without a sweep", ["sweep.job=1"], ["sweep.job=1: is one of a sweep that goes on"]),
    ("a file of one job", ["sweep.sbatch=true"], ["sweep.sbatch=true: writes down the jobs of a sweep; it"]),
    (
        "plugins",
        ["-m", "hydra/launcher=submitit_slurm", "hydra.sweeper.storage=sqlite:///x.db"],
        [
            "2 mistakes",
            "let Slurm run them at the same time: sweep.sbatch=true",
            "the ledger of the sweep keeps",
        ],
    ),
    (
        "a sweep that fits nowhere",
        ["-m", "hardware.memory_gib=1e-5", "seed=1,2"],
        ["every job of this sweep is infeasible; nothing was started", "does not fit: needs 0.0"],
    ),
    ("two metrics", ["-m", "sweep.metric=a,b"], ["sweep.metric=a,b: is one for the whole sweep"]),
    ("a sweeper's key", ["-m", "hydra.sweeper.nope=1"], ["hydra.sweeper.nope: no such group or key"]),
    ("flag", ["--foo"], ["unrecognized arguments: --foo"]),
    ("flag alone", ["--resolve"], ["--resolve: belongs to --cfg job"]),
    ("flag's value", ["-c", "nope"], ["invalid choice: 'nope'"]),
    ("question with a typo", ["-c", "job", "task.stps=1"], ["nearest: task.steps"]),
    ("part", ["-c", "job", "-p", "modle"], ["--package modle: the configuration has no such part"]),
    ("hydra resolved", ["-c", "hydra", "--resolve", "-m"], ["--resolve: belongs", "-m, --cfg: only one"]),
    ("root", ["--config-name", "x"], ["there is one root configuration"]),
    ("help with a typo", ["--help", "task.stps=1"], ["nearest: task.steps"]),
    ("completion", ["-sc"], ["-sc install=bash|zsh|fish"]),
    ("rerun", ["--experimental-rerun", "x"], ["--experimental-rerun"]),
]


@pytest.mark.parametrize(("arguments", "told"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_input_is_refused(arguments: list[str], told: list[str], refused: Refused) -> None:
    said = refused(*arguments)
    for part in told:
        assert part in said


def test_a_sweep_is_told_the_same(refused: Refused) -> None:
    words = ["task.stps=1", "model.num_heads=7", "dataset.path=nope"]
    assert refused("-m", *words) == refused(*words)


class Launched(list):
    """What would have been started: (folder, configuration, overrides)."""


@pytest.fixture
def launched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Let nothing start; remember what would have been."""
    found = Launched()

    def remember(folder, plain, overrides, launch_folder, tags, conversation):  # type: ignore[no-untyped-def]
        found.append((folder.path, plain, overrides))
        return 0

    for module in (door, sweep_door):
        monkeypatch.setattr(module, "run_on_ranks", remember)
    return found


RIGHT = [
    ("./数据/外卖.csv", "数据/外卖.csv", "你好,世界", "./结果/a=b", "结果/a=b"),
    ("a=b.csv", "a=b.csv", "~", "~/mine", "mine"),
    ("train(1).csv", "train(1).csv", "1e3", "a b,c", "a b,c"),
    ("你好,世界.txt", "你好,世界.txt", "it's", "x${model.name}", "xtiny_7b"),
    ("~/home.txt", "home.txt", "[1]", "'a,b'", "a,b"),
]
"""A file as typed and as meant, a text, a folder for the run as typed and as meant."""


@pytest.mark.parametrize(("typed", "path", "text", "run_typed", "run_path"), RIGHT)
def test_awkward_names_are_right_input(
    typed: str, path: str, text: str, run_typed: str, run_path: str, folder: Path, launched: Launched
) -> None:
    words = [TEXT, f"dataset.path={typed}", f"dataset.column={text}", f"tracking.run_name={text}"]
    assert door.command([*words, f"hydra.run.dir={run_typed}"]) == 0
    ((run_folder, plain, overrides),) = launched
    assert plain["dataset"]["path"] == str(folder / path)
    assert plain["dataset"]["column"] == plain["tracking"]["run_name"] == text
    assert run_folder == folder / run_path
    assert overrides[:2] == [TEXT, f"dataset.path='{typed}'"]


def test_a_sweep_reaches_its_jobs_as_typed(folder: Path, launched: Launched) -> None:
    words = ["-m", "tracking.run_name=./a=b,'c,d'", "hydra.sweep.dir=./扫描", "model=glob(tiny_13*)"]
    words.append("tracking.enabled=false")
    assert door.command(words) == 0
    seen = [(plain["tracking"]["run_name"], plain["model"]["name"]) for _, plain, _ in launched]
    assert seen == [("./a=b", "tiny_13b"), ("c,d", "tiny_13b")]
    assert {path.parent for path, _, _ in launched} == {folder / "扫描"}


def test_a_job_whose_layout_cannot_be_is_marked_and_the_others_run(folder: Path, launched: Launched) -> None:
    words = ["-m", "hardware=2cpu,4cpu", "task.global_batch=6,8", "tracking.enabled=false"]
    assert door.command(words) == 0
    seen = [(plain["hardware"]["name"], plain["task"]["global_batch"]) for _, plain, _ in launched]
    assert seen == [("2cpu", 6), ("2cpu", 8), ("4cpu", 8)]
    (ranking,) = folder.glob("runs/sweep/*/sweep.json")
    told = {job["number"]: (job["status"], job["reason"]) for job in json.loads(ranking.read_text())["jobs"]}
    assert told[2][0] == "infeasible"
    assert told[2][1].startswith("task.global_batch=6: not a multiple of 4 data-parallel ranks")


def python(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, *(["-c", code] if code else ["-m", "bc2exp"]), *arguments]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


SHOW_MODULES = f"""
import json, sys
from bc2exp.__main__ import command
for words in json.loads(sys.argv[1]):
    try:
        code = command(words)
    except SystemExit as end:
        code = end.code or 0
    print("code", code, [name for name in {HEAVY} if name in sys.modules])
"""


def test_the_door_loads_nothing_heavy(folder: Path) -> None:
    before = tree(folder)
    commands = [
        ["task.stps=1", "model.num_heads=7"],
        ["-m", "seed=1,x", TEXT, "dataset.path=nope.csv"],
        ["--cfg", "job", "--resolve"],
        ["--help"],
    ]
    done = python(folder, SHOW_MODULES, json.dumps(commands))
    codes = [line for line in done.stdout.splitlines() if line.startswith("code ")]
    assert codes == ["code 2 []", "code 2 []", "code 0 []", "code 0 []"], done.stderr
    assert tree(folder) == before


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["single", "sweep"])
def test_the_process_ends_with_code_2(sweep: list[str], folder: Path) -> None:
    before = tree(folder)
    done = python(folder, "", *sweep, "task.stps=1", "modle=tiny", "dataset.pth=./数据/外卖.csv")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "bc2exp: 3 mistakes; nothing was started or written",
        "  task.stps=1: no such key; nearest: task.steps",
        "  modle=tiny: no such key; nearest: model",
        "  dataset.pth=./数据/外卖.csv: no such key; nearest: dataset.path",
    ]
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help", "hardware=2cpu"], ["model: baichuan2_13b, baichuan2_7b", "num_devices: 2"]),
        (["--cfg", "job", "-p", "task"], ["lr: ${model.recipes.${task.recipe}.lr}"]),
        (["--cfg", "job", "--resolve", "model=baichuan2_7b"], ["lr: 1.0e-06", "global_batch: 32"]),
        (["tracking.run_name=你好,世界", "--cfg", "job", "seed=5"], ["run_name: 你好,世界", "seed: 5"]),
        (["--info"], ["Config search path"]),
        (["--version"], ["Hydra"]),
        (["--hydra-help"], ["== Flags =="]),
    ],
)
def test_questions_are_answered_and_nothing_is_written(
    arguments: list[str], shown: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(folder)
    try:
        code = door.command(arguments)
    except SystemExit as end:
        code = end.code or 0
    said = capsys.readouterr()
    assert code == 0, said.err
    for part in shown:
        assert part in said.out
    assert tree(folder) == before


def test_conf_is_found_inside_the_package_of_a_wheel(folder: Path) -> None:
    site = folder / "site"
    (site / "bc2exp").mkdir(parents=True)
    for entry in (*(REPOSITORY / "bc2exp").iterdir(), REPOSITORY / "conf"):
        (site / "bc2exp" / entry.name).symlink_to(entry)
    # the modules that look for the folders must lie in the copy: a link would lead back to the checkout
    for linked in ("config", "experiments"):
        (site / "bc2exp" / linked).unlink(missing_ok=True)
    (site / "bc2exp" / "config").mkdir()
    for source in (REPOSITORY / "bc2exp" / "config").glob("*.py"):
        (site / "bc2exp" / "config" / source.name).write_bytes(source.read_bytes())
    (site / "bc2exp" / "experiments" / "study").mkdir(parents=True)
    text = "# @package _global_\nseed: 7\n"
    (site / "bc2exp" / "experiments" / "study" / "a.yaml").write_text(text, encoding="utf-8")
    elsewhere = folder / "别处"
    elsewhere.mkdir()
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{SHOW_MODULES}"
    done = python(elsewhere, code, json.dumps([["--cfg", "job", "experiments=study/a", "hardware=2cpu"]]))
    assert done.stdout.splitlines()[-1] == "code 0 []", done.stderr
    assert "seed: 7\n" in done.stdout
    assert "num_devices: 2\n" in done.stdout
    assert list(elsewhere.iterdir()) == []
