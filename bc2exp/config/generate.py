"""task=generate: what is asked, of which model, and how it answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from bc2exp.config.fields import setting
from bc2exp.config.model_folders import model_folder_problems
from bc2exp.config.roots import absolute, nearest
from bc2exp.config.task import TaskConfig


class Prompting(Enum):
    """What a model is given of a prompt: a user's turn that asks for an answer, or the bare text."""

    chat = "chat"
    plain = "plain"


@dataclass
class GenerateConfig(TaskConfig):
    """Text that goes on from prompts, or a chat."""

    model: str | None = setting(
        "the model: published weights, a run, or a checkpoint of one; null: that of model.*", None, path=True
    )
    prompt: str | None = setting(
        "one prompt; where neither this nor prompts nor file is named: a chat on a terminal, else the lines "
        "of the standard input",
        None,
    )
    prompts: list[str] = setting("several prompts", default_factory=list)
    file: str | None = setting("a text file with a prompt a line", None, path=True)
    format: Prompting = setting("chat: Baichuan2's turns; plain: the text goes on", Prompting.chat)
    system: str | None = setting("what stands before the turns of a chat", None)
    template: str = setting("what becomes of a prompt: {prompt} stands for it", "{prompt}")
    max_new_tokens: int = setting("tokens of an answer at most", minimum=1)
    context: int = setting("tokens of prompt and answer together at most", minimum=2)
    temperature: float = setting("divides the logits; 0: always the most likely token", minimum=0)
    top_k: int | None = setting("most likely tokens that are drawn from; null: all", minimum=1)
    top_p: float = setting("probability that the tokens drawn from reach together", above=0, maximum=1)
    repetition_penalty: float = setting("makes what was said less likely; 1: does not", above=0)
    batch: int = setting("prompts that are answered together", 8, minimum=1)
    init_std: float = setting("standard deviation of fresh weights", above=0)


def generation_problems(values: dict[str, Any], folder: Path) -> list[str]:
    """One source of prompts, that is there; room for an answer; a template with a place; a model."""
    task = values["task"]
    if task["name"] != "generate":
        return []
    problems = []
    named = [key for key in ("prompt", "prompts", "file") if task[key]]
    if len(named) > 1:
        problems.append(f"{', '.join(f'task.{key}' for key in named)}: name one of them")
    if task["file"] is not None:
        file = absolute(task["file"], folder)
        if not file.is_file():
            problems.append(f"task.file={task['file']}: no such file{nearest(file)}")
    if "{prompt}" not in task["template"]:
        problems.append(f"task.template={task['template']}: has no {{prompt}}, where the prompt is to stand")
    if task["system"] is not None and task["format"] != "chat":
        problems.append("task.system: stands before the turns of a chat; it needs task.format=chat")
    if task["context"] > values["model"]["max_positions"] and task["model"] is None:
        problems.append(
            f"task.context={task['context']}: the model was made for "
            f"model.max_positions={values['model']['max_positions']}"
        )
    return problems + model_folder_problems("task.model", task["model"], values, folder)
