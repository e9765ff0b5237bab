"""The log of a training with Megatron-LM, Megatron-DeepSpeed or ModelLink.

One line an iteration, fields between bars; releases differ in which fields they print, in the colon, and in
what stands in front (a time in brackets, a rank). Every field is kept: known ones under this project's
names, others as `log/<their name>`. Where the list of arguments is printed, it is the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from bc2exp.report.compare.side import GRAD_NORM, LOSS, MEMORY, RATE, Series, nested, typed
from bc2exp.report.summary import SAMPLES, SECONDS, TOKENS

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?|nan|inf(?:inity)?)"
_ITERATION = re.compile(r"\biteration\s+(\d+)\s*/\s*(\d+|infinity)\s*\|(.*)", re.IGNORECASE)
_VALIDATION = re.compile(rf"\bloss at iteration\s+(\d+)\b.*?\|\s*lm loss value:\s*({_NUMBER})", re.IGNORECASE)
_MEMORY = re.compile(
    rf"after (\d+) iterations\) memory \(MB\)(?:.*?\bmax allocated:\s*({_NUMBER}))?"
    rf"(?:.*?\bmax reserved:\s*({_NUMBER}))?",
    re.IGNORECASE,
)
_ARGUMENT = re.compile(r"^(?:\W*\w*\W*:)?\s*([a-z]\w*) \.{2,} (.+?)\s*$")

_FIELDS: dict[str, tuple[str, float]] = {
    "lm loss": (LOSS, 1.0),
    "loss": (LOSS, 1.0),
    "grad norm": (GRAD_NORM, 1.0),
    "learning rate": (RATE, 1.0),
    "elapsed time per iteration (ms)": (SECONDS, 1e-3),
    "elapsed time per iteration (s)": (SECONDS, 1.0),
    "samples per second": (SAMPLES, 1.0),
    "tokens per gpu per second (tgs)": (TOKENS, 1.0),
    "tflops": ("perf/tflops_per_device", 1.0),
    "throughput per gpu (tflop/s/gpu)": ("perf/tflops_per_device", 1.0),
}
"""Field in lower case: metric, and the factor to its unit."""

_ARGUMENTS = {
    "seq_length": "dataset.sequence_length",
    "world_size": "hardware.num_devices",
    "params_dtype": "hardware.precision",
    "global_batch_size": "task.global_batch",
    "micro_batch_size": "task.micro_batch",
    "train_iters": "task.steps",
    "init_method_std": "task.init_std",
    "lr": "task.optimizer.lr",
    "weight_decay": "task.optimizer.weight_decay",
    "clip_grad": "task.optimizer.clip_norm",
    "adam_beta1": "task.optimizer.beta1",
    "adam_beta2": "task.optimizer.beta2",
    "adam_eps": "task.optimizer.eps",
    "min_lr": "task.schedule.min_lr",
    "lr_decay_style": "task.schedule.kind",
    "lr_warmup_fraction": "task.schedule.warmup_fraction",
    "tensor_model_parallel_size": "parallelism.tensor",
    "pipeline_model_parallel_size": "parallelism.pipeline",
    "sequence_parallel": "parallelism.sequence_parallel",
    "num_layers": "model.num_layers",
    "hidden_size": "model.hidden_size",
    "ffn_hidden_size": "model.intermediate_size",
    "num_attention_heads": "model.num_heads",
    "seed": "seed",
}
_WORDS = {"True": True, "False": False, "None": None}
_PRECISIONS = {"torch.bfloat16": "bf16", "torch.float32": "fp32", "torch.float16": "fp16"}


def read_megatron(lines: Iterable[str]) -> tuple[Series, dict[str, Any], list[str]]:
    """Series, configuration (nested) and notes of a log; the series are empty where no line is an iteration.

    Memory is what the ranks reserved at most (or allocated, where that is all they say), the largest of them.
    """
    series: Series = {}
    flat: dict[str, Any] = {}
    again, unread, torn = set(), set(), 0
    for line in lines:
        if found := _ITERATION.search(line):
            step, values, others, whole = _fields(found)
            if step in series.get(LOSS, {}):
                again.add(step)
            torn += not whole
            unread |= others
            for name, value in values.items():
                series.setdefault(name, {}).setdefault(step, value)
        elif found := _VALIDATION.search(line):
            series.setdefault("eval/loss", {}).setdefault(int(found[1]), float(found[2]))
        elif (found := _MEMORY.search(line)) and (most := found[3] or found[2]):
            peaks = series.setdefault(MEMORY, {})
            peaks[int(found[1])] = max(peaks.get(int(found[1]), 0.0), float(most) / 1024)
        elif (found := _ARGUMENT.match(line)) and found[1] in _ARGUMENTS:
            flat.setdefault(_ARGUMENTS[found[1]], _argument(found[2]))
    batches = set(series.get("log/global batch size", {}).values())
    if len(batches) == 1:
        flat.setdefault("task.global_batch", int(batches.pop()))
    notes = [f"{len(again)} iterations stand there more than once; the first of each counts"] * bool(again)
    notes += [f"{torn} lines are cut off; their last field was not read"] * bool(torn)
    notes += [f"fields without a number: {', '.join(sorted(unread))}"] * bool(unread)
    return series, nested(flat), notes


def _fields(found: re.Match[str]) -> tuple[int, dict[str, float], set[str], bool]:
    """The step, its values, the fields that hold no number, and whether the line is whole."""
    parts = found[3].rstrip().split("|")
    whole = (
        not parts.pop().strip()
    )  # every field ends in a bar; what follows the last one may be half a number
    values: dict[str, float] = {}
    others = set()
    for part in parts:
        name, _, text = part.strip().rpartition(" ")
        name = name.strip().rstrip(":").lower()
        number = re.match(_NUMBER, text, re.IGNORECASE)
        if not name or number is None:
            others |= {part.strip()} - {""}
            continue
        metric, factor = _FIELDS.get(name, (f"log/{name}", 1.0))
        values.setdefault(metric, float(number[0]) * factor)
    return int(found[1]), values, others, whole


def _argument(text: str) -> Any:
    if text in _PRECISIONS:
        return _PRECISIONS[text]
    return _WORDS[text] if text in _WORDS else typed(text)
