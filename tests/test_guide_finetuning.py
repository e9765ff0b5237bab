"""The guide to fine-tuning: twins whose commands run on small files of the names they use, keys that exist,
and messages that a person gets."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bc2exp.config.errors import UserError
from bc2exp.config.preflight import preflight
from bc2exp.data.packing import WAYS
from bc2exp.embedded import TOKENIZER
from tests.guide_runs import do
from tests.one_thread import one_thread
from tests.pages import broken_links, commands, fenced, shape, table
from tests.small_run import SMALL
from tests.train.parts import Memory
from tests.weights.folders import SEVEN_B, weights_for_the_door

__all__ = ["one_thread"]

ENGLISH, CHINESE = GUIDES = ("docs/guides/finetuning.md", "docs/guides/finetuning.zh.md")
OPTIONS, KINDS, PACKING, MESSAGES = range(4)
MODEL = [word for word in SMALL if word.startswith("model.")]
QUICK = [
    "task.epochs=null",
    "task.steps=2",
    "task.eval_every=1",
    "task.eval_samples=4",
    "task.global_batch=8",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the guide names."""
    folder = tmp_path_factory.mktemp("site")
    with (folder / "shop.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [("好" if n % 3 else "差", f"第{n}单", (5, 3, 1)[n % 3]) for n in range(60)]
        csv.writer(file).writerows([("text", "title", "stars"), *rows])
    with (folder / "waimai_10k.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("label", "review"), *((n % 2, f"第{n}单") for n in range(40))])
    alpaca = [{"instruction": f"数到{n}", "input": "", "output": str(n)} for n in range(40)]
    talks = [{"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "好"}]}] * 40
    for name, objects in (("alpaca", alpaca), ("talks", talks)):
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    weights_for_the_door(folder / "Baichuan2-7B-Base", **SEVEN_B)
    shutil.copy(TOKENIZER, folder / "Baichuan2-7B-Base" / "tokenizer.model")
    (folder / "dataset").mkdir()
    (yaml,) = fenced(ENGLISH, "yaml")
    (folder / "dataset" / "shop.yaml").write_text(yaml.partition("\n")[2], encoding="utf-8")
    return folder


def tuned(site: Path, words: list[str]) -> Memory:
    """Do the tuning of the command line in `site`; raises UserError with what a person would be told."""
    run, journal = do(site, words)
    assert (run / "weights").is_dir()
    return journal


def test_the_twins_have_one_shape_and_one_set_of_commands() -> None:
    for kind in ("bash", "yaml"):
        assert fenced(ENGLISH, kind) == fenced(CHINESE, kind)
    assert shape(ENGLISH) == shape(CHINESE)
    english, chinese = ([table(name, number) for number in range(4)] for name in GUIDES)

    def keys(row: list[str]) -> list[str]:
        return re.findall(r"`[^`]+`", row[1])

    assert [keys(row) for row in english[OPTIONS]] == [keys(row) for row in chinese[OPTIONS]]
    assert [row[2:] for row in english[PACKING]] == [row[2:] for row in chinese[PACKING]]
    for number in (KINDS, PACKING, MESSAGES):
        assert [row[0] for row in english[number]] == [row[0] for row in chinese[number]]


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


def test_the_commands_do_what_they_say(site: Path) -> None:
    ran = 0
    for command in commands(ENGLISH):
        words = shlex.split(command)[3:]
        assert preflight(words, sweep=False, folder=site).problems == []
        if not any(word.startswith(("hardware=", "experiments=")) for word in words):
            keys = {word.partition("=")[0]: word for word in (*words, *MODEL, *QUICK)}
            losses = tuned(site, list(keys.values())).series("eval/loss")
            assert len(losses) == 2
            ran += 1
    assert ran == 5


def test_every_key_of_the_options_exists(site: Path) -> None:
    (job,) = preflight(["task=finetune"], sweep=False, folder=site).jobs
    for row in table(ENGLISH, OPTIONS):
        for key in re.findall(r"`([^`]+)`", row[1]):
            found = OmegaConf.select(job, key.removesuffix(".*"), default="nothing")
            assert found != "nothing" or key == "hydra.run.dir", key


def test_the_kinds_and_ways_are_those_of_the_program() -> None:
    assert {row[0].strip("`") for row in table(ENGLISH, PACKING)} == set(WAYS)
    assert {row[2].strip("`") for row in table(ENGLISH, KINDS)} == {
        "classification",
        "instruction",
        "conversation",
    }


def test_the_messages_are_those_that_a_person_gets(site: Path) -> None:
    def rows(name: str, *rows: tuple, header: tuple = ("label", "review")) -> list[str]:
        with (site / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        return ["dataset=waimai_10k", f"dataset.path={name}", "dataset.num_train=30"]

    good = [(n % 2, f"第{n}单") for n in range(40)]
    (site / "open.csv").write_text('label,review\n1,"好\n0,慢\n', encoding="utf-8")
    cases = [
        ["dataset=embedded"],
        rows("a.csv", *good, header=("label", "text")),
        rows("b.csv", *good, *[(2, str(n)) for n in range(11)]),
        ["dataset=waimai_10k", "dataset.path=open.csv"],
        rows("c.csv"),
        rows("d.csv", *[(1, text) for _, text in good]),
        [*rows("e.csv", *[(label, "很好" * 20) for label, _ in good]), "dataset.sequence_length=16"],
        [*rows("f.csv", *good)[:2], "dataset.num_train=40"],
        ["task.best_metric=eval/loss", "task.eval_every=null"],
    ]
    quoted = [row[0].strip("`") for row in table(ENGLISH, MESSAGES)]
    assert len(quoted) == len(cases)
    for words, message in zip(cases, quoted, strict=True):
        with pytest.raises(UserError) as error:
            tuned(site, ["task=finetune", *words, *MODEL])
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert re.fullmatch(pattern, given := str(error.value)), f"{message}\n{given}"
