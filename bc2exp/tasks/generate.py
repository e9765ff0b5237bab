"""Text from a model: answers to prompts, or a chat, streamed as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bc2exp.config.generate import GenerateConfig, Prompting
from bc2exp.config.root import Config
from bc2exp.data.order import stable_seed
from bc2exp.generation.decoding import Answer, decode
from bc2exp.generation.rounds import Fitted, fit_rounds, fit_text, room_for_prompt
from bc2exp.generation.sampling import Sampling
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.world import World
from bc2exp.tasks.models import Answerer, make_copies_mesh, open_model
from bc2exp.tasks.out_of_memory import telling_what_takes_less
from bc2exp.text.chat import Turn
from bc2exp.text.tokenizer import Tokenizer
from bc2exp.tracking.journal import Journal, NullJournal, Tail
from bc2exp.tracking.talk import ANSWERS, REQUESTS, STREAM, Lines, NoLines

_POLL_SECONDS = 0.02
_UNFINISHED = "\ufffd"


@telling_what_takes_less
def generate(config: Config, folder: Path, world: World, journal: Journal | NullJournal) -> str:
    """Answer what `requests.jsonl` in `folder` asks, until it ends; leaves `answers.jsonl` there."""
    task = config.task
    assert isinstance(task, GenerateConfig)
    mesh = make_copies_mesh(config, world)
    answerer = open_model(config, task.model, "task.model", mesh, task.init_std, journal)
    speaks = mesh.tensor_rank == 0
    stream = Lines(folder / STREAM.format(copy=mesh.data_rank)) if speaks else NoLines()
    speaker = Speaker(task, config.seed, answerer, mesh, stream, folder / "stop")
    stream.write(ready=True)
    prompts: list[str] = []
    turns: list[Turn] = []
    for request in requests(folder / REQUESTS):
        if "prompt" in request:
            prompts.append(request["prompt"])
        elif "clear" in request:
            turns = []
        elif mesh.data_rank == 0:  # of several copies one is enough for a chat
            turns.append(Turn("user", filled(task.template, request["say"])))
            turns.append(Turn("assistant", speaker.reply(request["say"], turns)))
    if prompts:
        speaker.answer_all(prompts)
    found = world.gather(speaker.done if speaks else [])
    done = sorted((each for part in found for each in part), key=lambda each: each["number"])
    if world.rank == 0:
        answers = Lines(folder / ANSWERS)
        for each in done:
            answers.write(**each)
        answers.close()
    tokens, seconds = sum(each["tokens"] for each in done), max(world.gather(speaker.seconds))
    journal.metrics(
        0,
        {
            "generate/answers": len(done),
            "generate/tokens": tokens,
            "perf/new_tokens_per_s": tokens / seconds if seconds else 0.0,
        },
    )
    stopped = bool(prompts) and any(world.gather(len(done) < len(prompts) or speaker.stopped))
    return "stopped" if stopped else "done"


def requests(path: Path) -> Iterator[dict[str, Any]]:
    """What is asked, as it comes, up to the end. Every rank reads it for itself: nobody waits in an exchange
    for somebody who thinks."""
    tail = Tail(path)
    while True:
        for request in tail.poll():
            if "end" in request:
                return
            yield request
        time.sleep(_POLL_SECONDS)


def filled(template: str, prompt: str) -> str:
    """A template with its prompt; other braces are text."""
    return template.replace("{prompt}", prompt)


@dataclass
class Spoken:
    """An answer on its way: tokens become text when they are whole characters."""

    tokenizer: Tokenizer
    tokens: list[int] = field(default_factory=list)
    text: str = ""

    def add(self, token: int) -> str:
        """The text that a token adds; nothing while it is part of a character."""
        self.tokens.append(token)
        whole = self.tokenizer.decode(self.tokens)
        return "" if whole.endswith(_UNFINISHED) else self._gained(whole)

    def finish(self) -> str:
        """What is left: characters that were never completed."""
        return self._gained(self.tokenizer.decode(self.tokens))

    def _gained(self, whole: str) -> str:
        gained, self.text = whole[len(self.text) :], whole
        return gained


@dataclass
class Speaker:
    """Answers prompts and streams what it says.

    Attributes:
        done: the answers so far, as `answers.jsonl` holds them.
        seconds: spent on them.
        stopped: an answer was broken off on request.
    """

    task: GenerateConfig
    seed: int
    answerer: Answerer
    mesh: Mesh
    stream: Lines | NoLines
    stop_file: Path
    done: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False

    def reply(self, said: str, turns: list[Turn]) -> str:
        """The next turn of a chat."""
        number = len(self.done)
        self._answer([number], [said], [self._fit(turns)])
        answer: str = self.done[-1]["answer"]
        return answer

    def answer_all(self, prompts: list[str]) -> None:
        """This copy's share of the prompts, some at a time."""
        mine = range(self.mesh.data_rank, len(prompts), self.mesh.num_data_ranks)
        for start in range(0, len(mine), self.task.batch):
            if self.stopped:
                return
            numbers = list(mine[start : start + self.task.batch])
            asked = [prompts[number] for number in numbers]
            self._answer(numbers, asked, [self._fit_prompt(prompt) for prompt in asked])

    def _fit_prompt(self, prompt: str) -> Fitted:
        text = filled(self.task.template, prompt)
        if self.task.format is Prompting.chat:
            return self._fit([Turn("user", text)])
        return fit_text(self.answerer.tokenizer.encode(text), self._room)

    def _fit(self, turns: list[Turn]) -> Fitted:
        system = [] if self.task.system is None else [Turn("system", self.task.system)]
        return fit_rounds(self.answerer.tokenizer, [*system, *turns], self._room)

    @property
    def _room(self) -> int:
        return room_for_prompt(self.task.context, self.task.max_new_tokens)

    def _answer(self, numbers: list[int], asked: list[str], fitted: list[Fitted]) -> None:
        began = time.monotonic()
        task, tokenizer = self.task, self.answerer.tokenizer
        spoken = [Spoken(tokenizer) for _ in numbers]
        for number, each in zip(numbers, fitted, strict=True):
            if each.rounds or each.tokens:
                self.stream.write(number=number, left_out=each._asdict() | {"ids": len(each.ids)})

        def told(row: int, token: int) -> None:
            if text := spoken[row].add(token):
                self.stream.write(number=numbers[row], text=text)

        def ended(row: int, answer: Answer) -> None:
            if text := spoken[row].finish():
                self.stream.write(number=numbers[row], text=text)
            self.stream.write(number=numbers[row], ended=answer.ended)

        answers = decode(
            self.answerer.layout.logits,
            [each.ids for each in fitted],
            sampling=Sampling(task.temperature, task.top_k, task.top_p, task.repetition_penalty),
            seeds=[stable_seed("generate", self.seed, number) for number in numbers],
            max_new_tokens=[min(task.max_new_tokens, task.context - len(each.ids)) for each in fitted],
            eos_id=tokenizer.eos_id,
            num_words=tokenizer.vocab_size,
            told=told,
            ended=ended,
            stop=lambda: self.answerer.layout.any(self.stop_file.exists()),
        )
        for row, answer in enumerate(answers):
            self.done.append(
                {
                    "number": numbers[row],
                    "prompt": asked[row],
                    "answer": tokenizer.decode(answer.tokens),
                    "tokens": len(answer.tokens),
                    "prompt_tokens": len(fitted[row].ids),
                    "left_out_rounds": fitted[row].rounds,
                    "left_out_tokens": fitted[row].tokens,
                    "ended": answer.ended,
                }
            )
            self.stopped |= answer.ended == "stopped"
        self.seconds += time.monotonic() - began
