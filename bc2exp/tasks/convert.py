"""Weights from one layout into another: `task=convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bc2exp.config.convert import ConvertConfig, Format, source_shape
from bc2exp.config.errors import UserError
from bc2exp.config.model import ModelConfig
from bc2exp.config.root import Config
from bc2exp.config.weight_files import MEGATRON, weight_kind
from bc2exp.parallel.world import World
from bc2exp.report.conversion import some
from bc2exp.storage import atomic
from bc2exp.tasks import build
from bc2exp.tasks.telling import Told
from bc2exp.text.tokenizer import Tokenizer, find_tokenizer
from bc2exp.tracking.journal import Journal, NullJournal
from bc2exp.weights import targets
from bc2exp.weights.beside import files_beside
from bc2exp.weights.convert import convert as convert_weights
from bc2exp.weights.hf import open_hf
from bc2exp.weights.megatron import open_megatron

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def convert(config: Config, folder: Path, world: World, journal: Journal | NullJournal) -> str:
    """Convert the configured folder; leaves `conversion.json` in `folder`."""
    task = config.task
    assert isinstance(task, ConvertConfig)
    assert task.source is not None
    assert task.target is not None
    source, target = Path(task.source), Path(task.target)
    own_tokenizer = None if config.model.tokenizer is None else find_tokenizer(config.model.tokenizer, None)
    try:
        kind = weight_kind(source)
        weights = (
            open_megatron(source, megatron_shape(source, config.model, journal))
            if kind == MEGATRON
            else (open_hf(source))
        )
        beside = files_beside(source, task.format.value, own_tokenizer)
    except ValueError as error:
        raise UserError(f"task.source={task.source}: {error}") from None
    done = convert_weights(
        weights,
        target,
        make_target(task),
        dtype=None if task.dtype is None else DTYPES[task.dtype],
        verify=task.verify,
        beside=beside,
        about={"source": str(source), "format": task.format.value},
        progress=Told(journal, "converting"),
    )
    if done.nan:
        journal.event("note", text=f"values that are not numbers (NaN) are in {some(done.nan)}")
    report = {
        "source": str(source),
        "target": str(target),
        "kind": kind,
        "format": task.format.value,
        "shape": weights.shape,
        "beside": list(beside),
        **asdict(done),
    }
    atomic.write_json(folder / "conversion.json", report)
    journal.metrics(0, {"convert/bytes": done.bytes, "convert/mb_per_s": done.bytes / 1e6 / done.convert_s})
    return "done"


def make_target(task: ConvertConfig) -> targets.Target:
    """The layout of the target."""
    max_shard_bytes = int(task.max_shard_gb * 1e9)
    if task.format is Format.hf:
        return targets.Published(max_shard_bytes)
    if task.format is Format.llama:
        return targets.Llama(max_shard_bytes)
    return targets.Megatron(
        tensor=task.tensor,
        pipeline=task.pipeline,
        merged=task.merged_name if task.merge_mlp else None,
        vocab_divisible_by=task.vocab_divisible_by,
    )


def megatron_shape(source: Path, model: ModelConfig, journal: Journal | NullJournal) -> dict[str, Any] | None:
    """The shape of the model in shards: None where our own conversion wrote it down, else the chosen one."""
    if source_shape(source) is not None:
        return None
    vocab_size = model.vocab_size
    if vocab_size is None:
        tokenizer = Tokenizer(find_tokenizer(model.tokenizer, str(source)))
        vocab_size = build.find_vocabulary(model, tokenizer, journal)
    return {**build.shape_of(model, vocab_size), "max_positions": model.max_positions}
