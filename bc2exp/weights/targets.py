"""The layouts that a conversion can write: published, Llama's, ModelLink's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bc2exp.config.convert import padded_vocabulary
from bc2exp.config.weight_files import TRACKER
from bc2exp.weights import hf_layout, llama, megatron_layout
from bc2exp.weights.hf import open_hf, read_tensors
from bc2exp.weights.layout import Plan
from bc2exp.weights.megatron import FILE, RELEASE, open_megatron
from bc2exp.weights.torch_writing import TorchWriter
from bc2exp.weights.writing import MAX_SHARD_BYTES, Flusher, Header, SafetensorsWriter


class Writer(Protocol):
    """Takes the tensors of one plan."""

    @property
    def files(self) -> dict[str, str]:
        """The file of every tensor, counted from the folder."""

    def put(self, name: str, tensor: Tensor, row: int) -> None:
        """Take some rows of a tensor."""

    def finish(self) -> None:
        """All are there."""

    def close(self) -> None:
        """Let go of files, whatever happened."""


class Target(Protocol):
    """A layout to be written."""

    def plans(self, shape: Mapping[str, Any]) -> dict[str, Plan]:
        """What is to be stored, in groups, each of which one writer takes."""

    def writer(self, folder: Path, group: str, header: Header, flusher: Flusher) -> Writer:
        """The writer of a group."""

    def beside(self, shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, bytes]:
        """The other files of the layout and their content."""

    def read(self, folder: Path, shape: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
        """The stored tensors of every group, mapped. ValueError where they are not what was to be written."""


@dataclass(frozen=True)
class Published:
    """Safetensors with the names and the config.json of the published folders."""

    max_shard_bytes: int = MAX_SHARD_BYTES

    def plans(self, shape: Mapping[str, Any]) -> dict[str, Plan]:
        return {"": hf_layout.published_plan(shape)}

    def writer(self, folder: Path, group: str, header: Header, flusher: Flusher) -> Writer:
        return SafetensorsWriter(folder, header, self.max_shard_bytes, flusher)

    def beside(self, shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, bytes]:
        config = hf_layout.to_config(shape, dtype)
        return {"config.json": as_json(config), "generation_config.json": as_json(hf_layout.GENERATION)}

    def read(self, folder: Path, shape: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
        return {"": open_hf(folder).tensors}


@dataclass(frozen=True)
class Llama:
    """Safetensors that transformers' LlamaForCausalLM loads; see `llama`."""

    max_shard_bytes: int = MAX_SHARD_BYTES

    def plans(self, shape: Mapping[str, Any]) -> dict[str, Plan]:
        return {"": llama.llama_plan(shape)}

    def writer(self, folder: Path, group: str, header: Header, flusher: Flusher) -> Writer:
        return SafetensorsWriter(folder, header, self.max_shard_bytes, flusher)

    def beside(self, shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, bytes]:
        config = llama.to_config(shape, dtype)
        return {"config.json": as_json(config), "generation_config.json": as_json(hf_layout.GENERATION)}

    def read(self, folder: Path, shape: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
        return {"": read_tensors(folder)[0]}


@dataclass(frozen=True)
class Megatron:
    """ModelLink's shards.

    Args:
        tensor, pipeline: tensor-parallel ranks and stages.
        merged: what gate and up in one matrix are called; None: they stay two.
        vocab_divisible_by: times `tensor`, what the padded vocabulary is a multiple of.
    """

    tensor: int
    pipeline: int
    merged: str | None
    vocab_divisible_by: int

    def plans(self, shape: Mapping[str, Any]) -> dict[str, Plan]:
        padded = padded_vocabulary(shape["vocab_size"], self.vocab_divisible_by, self.tensor)
        return {
            f"{RELEASE}/{megatron_layout.rank_folder(rank, stage, self.pipeline)}": megatron_layout.rank_plan(
                shape,
                tensor_rank=rank,
                tensor=self.tensor,
                stage=stage,
                pipeline=self.pipeline,
                merged=self.merged,
                padded=padded,
            )
            for stage in range(self.pipeline)
            for rank in range(self.tensor)
        }

    def writer(self, folder: Path, group: str, header: Header, flusher: Flusher) -> Writer:
        return TorchWriter(folder, f"{group}/{FILE}", header, flusher, _checkpoint)

    def beside(self, shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, bytes]:
        return {TRACKER: RELEASE.encode()}

    def read(self, folder: Path, shape: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in open_megatron(folder, shape).tensors.items():
            rank, _, name = key.partition("/")
            groups.setdefault(f"{RELEASE}/{rank}", {})[name] = tensor
        return {**groups}


def _checkpoint(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a rank's file holds."""
    return {"checkpoint_version": 3.0, "model": {"language_model": megatron_layout.nested(tensors)}}


def as_json(value: Any) -> bytes:
    """JSON as the files of the layouts have it."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
