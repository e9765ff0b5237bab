"""The guide of weights: twins, and commands that do what they say on small folders of the names they use."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from bc2exp.config.preflight import preflight
from bc2exp.tasks.convert import convert
from tests.pages import broken_links, commands, fenced, shape, table
from tests.small_run import small_config
from tests.train.parts import ONE_RANK, Memory
from tests.weights.folders import published, shards_by_hand, tensors_of

ENGLISH, CHINESE = GUIDES = ("docs/guides/weights.md", "docs/guides/weights.zh.md")
FILES, MESSAGES = 0, -1
SMALL = {
    "vocab_size": 1200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 2,
    "num_heads": 8,
}


def words_of(command: str) -> list[str]:
    """The overrides of a command line, with a small model in the place of the 7B."""
    words = shlex.split(command)[3:]
    named = [f"model.{key}={value}" for key, value in SMALL.items()]
    return [*words, *named] if "model=baichuan2_7b" in words else words


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the guide names."""
    folder = tmp_path_factory.mktemp("site")
    _, weights = published(folder / "Baichuan2-7B-Base", **SMALL)
    (weights / "tokenizer.model").write_bytes(b"pieces")
    shards_by_hand(tensors_of(weights), folder / "shards", tensor=2, heads=8, divisible_by=128)
    (folder / "notes.txt").write_text("one line\n")
    return folder


def test_the_twins_have_one_shape_and_one_set_of_commands() -> None:
    assert fenced(ENGLISH) == fenced(CHINESE)
    assert shape(ENGLISH) == shape(CHINESE)
    assert [row[0] for row in table(ENGLISH, MESSAGES)] == [row[0] for row in table(CHINESE, MESSAGES)]
    assert all(len(row) == 4 for name in GUIDES for row in table(name, FILES))


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


def test_the_commands_do_what_they_say_one_after_the_other(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site)
    for number, command in enumerate(commands(ENGLISH)):
        words = words_of(command)
        assert preflight(words, sweep=False, folder=site).problems == []
        if "task=convert" in words:
            run = site / f"run-{number}"
            # paths count from the folder of the run in `small_config`
            words = [word.replace("task.source=", f"task.source={site}/") for word in words]
            words = [word.replace("task.target=", f"task.target={site}/") for word in words]
            config = small_config(run, *words)
            assert convert(config, run, ONE_RANK, Memory()) == "done"
    original = tensors_of(site / "Baichuan2-7B-Base")
    for name in ("back", "from-modellink"):
        found = tensors_of(site / name)
        assert found.keys() == original.keys()
        assert all(bool((found[key] == value).all()) for key, value in original.items())
    assert (site / "back" / "tokenizer.model").read_bytes() == b"pieces"
    assert len(list((site / "shards8" / "release").iterdir())) == 8


def test_the_messages_are_those_of_the_program() -> None:
    source = "".join(
        path.read_text()
        for folder in ("weights", "config")
        for path in (Path(__file__).parents[1] / "bc2exp" / folder).glob("*.py")
    )
    for row in table(ENGLISH, MESSAGES):
        first = row[0].strip("`").split("…")[0].split(":")[0].split("=")[0].strip()
        assert first in source, row[0]
