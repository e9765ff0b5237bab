"""The generation task behind its files: what is asked in, what is said out, on one rank and on several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bc2exp.config.errors import UserError
from bc2exp.embedded import TOKENIZER
from bc2exp.parallel.world import World
from bc2exp.tasks.generate import Spoken, generate
from bc2exp.tasks.pretrain import pretrain
from bc2exp.text.chat import Turn, generation_prompt
from bc2exp.text.tokenizer import Tokenizer
from bc2exp.tracking.talk import Lines, Streams
from tests.small_run import small_config
from tests.train.parts import ONE_RANK, Memory

PROMPTS = ["送餐很快", "好", "The soup was cold and the rider", "一二三四五六七八九十", "味道不错,下次再来"]
GREEDY = ("task=generate", "task.temperature=0", "task.repetition_penalty=1", "task.max_new_tokens=6")


def asked(folder: Path, requests: list[dict[str, Any]]) -> None:
    """Leave requests as the parent does."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = Lines(folder / "requests.jsonl")
    for request in (*requests, {"end": True}):
        lines.write(**request)
    lines.close()


def do(world: World, folder: Path, words: tuple[str, ...], config_folder: Path | None = None) -> str:
    """The task on a rank; how it ended."""
    own = config_folder or (folder if world.rank == 0 else folder / f"rank-{world.rank}")
    set_again = [word.partition("=")[0] for word in words]
    greedy = [word for word in GREEDY if word.partition("=")[0] not in set_again]
    return generate(small_config(own, *greedy, *words), folder, world, Memory())


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def answer_all(folder: Path, *words: str, world: World = ONE_RANK) -> list[dict[str, Any]]:
    asked(folder, [{"prompt": prompt} for prompt in PROMPTS])
    assert do(world, folder, words) == "done"
    return answers(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The answers of one rank, each prompt in a batch of its own."""
    return answer_all(tmp_path_factory.mktemp("alone"), "task.batch=1")


def test_answers_are_in_order_and_what_was_streamed(alone, tmp_path: Path) -> None:
    found = answer_all(tmp_path, "task.batch=2")
    assert found == alone
    assert [each["prompt"] for each in found] == PROMPTS
    streamed = dict.fromkeys(range(len(PROMPTS)), "")
    for said in Streams(tmp_path).poll():
        streamed[said.get("number", 0)] += said.get("text", "")
    assert list(streamed.values()) == [each["answer"] for each in found]


@pytest.mark.parametrize("layout", ["ddp", "tp2"])
def test_several_ranks_say_the_same(two_ranks, alone, layout: str, tmp_path: Path) -> None:
    asked(tmp_path, [{"prompt": prompt} for prompt in PROMPTS])
    words = ("hardware=2cpu", f"parallelism={layout}", "task.batch=2")
    assert two_ranks(do, tmp_path, words) == ["done", "done"]
    assert answers(tmp_path) == alone
    assert len(list(tmp_path.glob("stream-*.jsonl"))) == (2 if layout == "ddp" else 1)


@pytest.mark.parametrize("layout", ["ddp", "tp2"])
def test_a_chat_on_several_ranks_has_one_voice(two_ranks, layout: str, tmp_path: Path) -> None:
    talk = [{"say": "你好"}, {"say": "再见"}, {"clear": True}, {"say": "再见"}]
    asked(tmp_path / "one", talk)
    do(ONE_RANK, tmp_path / "one", ())
    asked(tmp_path / "two", talk)
    two_ranks(do, tmp_path / "two", ("hardware=2cpu", f"parallelism={layout}"))
    assert answers(tmp_path / "two") == answers(tmp_path / "one")
    first, second, anew = answers(tmp_path / "one")
    assert second["prompt_tokens"] > anew["prompt_tokens"]  # the first round stood before it
    tokenizer = Tokenizer(TOKENIZER)
    turns = [Turn("user", "你好"), Turn("assistant", first["answer"]), Turn("user", "再见")]
    assert second["prompt_tokens"] == len(generation_prompt(tokenizer, turns))


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    asked(tmp_path, [{"say": "送餐很快" * 5}, {"say": "好吃" * 8}])
    do(ONE_RANK, tmp_path, ("task.context=40", "task.system=be kind"))
    first, second = answers(tmp_path)
    assert first["left_out_tokens"] == first["left_out_rounds"] == 0
    assert (second["left_out_rounds"], second["left_out_tokens"]) == (1, 0)
    told = [said["left_out"] for said in Streams(tmp_path).poll() if "left_out" in said]
    assert told == [{"ids": second["prompt_tokens"], "rounds": 1, "tokens": 0}]


def test_a_template_is_filled_and_plain_text_goes_on(tmp_path: Path) -> None:
    tokenizer = Tokenizer(TOKENIZER)
    asked(tmp_path / "a", [{"prompt": "a {b}"}])
    do(ONE_RANK, tmp_path / "a", ("task.template={prompt} -> ",))
    (found,) = answers(tmp_path / "a")
    assert found["prompt_tokens"] == len(generation_prompt(tokenizer, [Turn("user", "a {b} -> ")]))
    asked(tmp_path / "b", [{"prompt": "送餐"}])
    do(ONE_RANK, tmp_path / "b", ("task.format=plain",))
    assert answers(tmp_path / "b")[0]["prompt_tokens"] == len(tokenizer.encode("送餐"))


def test_a_stop_ends_it_with_what_was_said(tmp_path: Path) -> None:
    asked(tmp_path, [{"prompt": prompt} for prompt in PROMPTS])
    (tmp_path / "stop").touch()
    assert do(ONE_RANK, tmp_path, ("task.batch=2",)) == "stopped"
    assert [each["ended"] for each in answers(tmp_path)] == ["stopped", "stopped"]


def test_sampling_is_seeded(tmp_path: Path) -> None:
    trained = tmp_path / "trained"  # fresh weights would depend on the seed, too
    pretrain(small_config(trained, "task.steps=1"), trained, ONE_RANK, Memory())
    hot = ("task.temperature=1", "task.top_k=null", "task.top_p=1", f"task.model={trained}")
    one, same = (answer_all(tmp_path / name, *hot) for name in ("one", "same"))
    other = answer_all(tmp_path / "other", *hot, "seed=7")
    assert one == same
    assert [each["answer"] for each in one] != [each["answer"] for each in other]


def test_a_model_of_other_heads_than_the_layout_needs_is_named(two_ranks, tmp_path: Path) -> None:
    asked(tmp_path, [{"prompt": "a"}])
    run = tmp_path / "trained"
    config = small_config(run, "task.steps=1", "model.num_heads=1")
    pretrain(config, run, ONE_RANK, Memory())
    words = ("hardware=2cpu", "parallelism=tp2", f"task.model={run}")
    (message, _) = two_ranks(refused, tmp_path, words)
    assert "parallelism.tensor=2: does not divide the 1 heads" in message


def refused(world: World, folder: Path, words: tuple[str, ...]) -> str:
    try:
        do(world, folder, words)
    except UserError as error:
        return str(error)
    return "taken"


def test_characters_come_whole() -> None:
    tokenizer = Tokenizer(TOKENIZER)
    text = "好🍜吃"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # some character takes several tokens
    spoken = Spoken(tokenizer)
    pieces = [spoken.add(token) for token in ids]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    broken = Spoken(tokenizer)
    assert "".join(broken.add(token) for token in ids[:-2]) + broken.finish() == tokenizer.decode(ids[:-2])
