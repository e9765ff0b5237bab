"""Folders of weights for tests; ModelLink's shards are cut here by hand, as an oracle for our own."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bc2exp.weights import save_hf
from tests.model.small import small_model

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 4,
    "num_heads": 8,
}
"""Eight heads, so that eight ranks have one each; 300 words come out even on no power of two."""


SEVEN_B = {
    "vocab_size": 125_696,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
"""Fields of the published config.json of the 7B."""


def weights_for_the_door(folder: Path, position: str = "rope", **fields: Any) -> Path:
    """A folder that looks like weights to who reads no tensors."""
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = {
        "model_type": "baichuan",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config |= {"max_position_embeddings": 4096} if position == "rope" else {}
    config |= fields
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def published(folder: Path, dtype: torch.dtype = torch.float32, position: str = "rope", **changes: Any):  # type: ignore[no-untyped-def]
    """The model of SHAPE and the folder it was saved to, a tensor or two in a file."""
    model = small_model(position, **{**SHAPE, **changes})
    save_hf(model.state_dict(), folder, config=model.shape, dtype=dtype, max_shard_bytes=60_000)
    return model, folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a published folder, read by the safetensors package."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def as_bin(folder: Path, target: Path, *, index: bool = True, **save: Any) -> Path:
    """The same folder with .bin files."""
    target.mkdir()
    weight_map = {}
    paths = sorted(folder.glob("*.safetensors"))
    for number, path in enumerate(paths, start=1):
        name = (
            f"pytorch_model-{number:05d}-of-{len(paths):05d}.bin" if len(paths) > 1 else "pytorch_model.bin"
        )
        tensors = load_file(path)
        torch.save(tensors, target / name, **save)
        weight_map |= dict.fromkeys(tensors, name)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (target / "pytorch_model.bin.index.json").write_text(text)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def rewrite(folder: Path, change: Any) -> None:
    """Apply `change` to the tensors of a folder of one shard, in place."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shards_by_hand(
    published_tensors: dict[str, Tensor],
    folder: Path,
    *,
    tensor: int,
    pipeline: int = 1,
    heads: int,
    merged: str | None = "proj",
    divisible_by: int = 128,
    args: Namespace | None = None,
    iteration: str = "release",
    more: dict[str, Any] | None = None,
) -> Path:
    """Shards as facts of the recipe describe them: thirds, rows by rank, then heads one after the other."""
    num_layers = 1 + max(int(name.split(".")[2]) for name in published_tensors if ".layers." in name)
    per_stage = num_layers // pipeline
    for stage in range(pipeline):
        for rank in range(tensor):
            model: dict[str, Any] = {"encoder": {}}
            for name, place in (("model.embed_tokens", "embedding"), ("lm_head", "output_layer")):
                words = published_tensors[f"{name}.weight"]
                added = -len(words) % (divisible_by * tensor)
                words = torch.cat([words, words[len(words) - added :]])
                mine = {"weight": words.chunk(tensor)[rank].clone()}
                if stage == (0 if place == "embedding" else pipeline - 1):
                    model[place] = {"word_embeddings": mine} if place == "embedding" else mine
            for index in range(per_stage):
                layer = f"model.layers.{stage * per_stage + index}"
                ours = f"layers.{index}"
                encoder = model["encoder"]
                thirds = published_tensors[f"{layer}.self_attn.W_pack.weight"].chunk(3)
                q, k, v = (third.chunk(tensor)[rank] for third in thirds)
                head_dim = thirds[0].shape[0] // heads
                rows = []
                for head in range(heads // tensor):
                    at = slice(head * head_dim, (head + 1) * head_dim)
                    rows += [q[at], k[at], v[at]]
                encoder[f"{ours}.self_attention.query_key_value.weight"] = torch.cat(rows)
                columns = published_tensors[f"{layer}.self_attn.o_proj.weight"].chunk(tensor, dim=1)
                encoder[f"{ours}.self_attention.dense.weight"] = columns[rank].contiguous()
                gate, up = (
                    published_tensors[f"{layer}.mlp.{kind}_proj.weight"].chunk(tensor)[rank].clone()
                    for kind in ("gate", "up")
                )
                if merged:
                    encoder[f"{ours}.mlp.{merged}.weight"] = torch.cat([gate, up])
                else:
                    encoder[f"{ours}.mlp.gate_proj.weight"] = gate
                    encoder[f"{ours}.mlp.dense_h_to_4h.weight"] = up
                down = published_tensors[f"{layer}.mlp.down_proj.weight"].chunk(tensor, dim=1)
                encoder[f"{ours}.mlp.dense_4h_to_h.weight"] = down[rank].contiguous()
                for norm in ("input_layernorm", "post_attention_layernorm"):
                    encoder[f"{ours}.{norm}.weight"] = published_tensors[f"{layer}.{norm}.weight"].clone()
            if stage == pipeline - 1:
                model["encoder"]["final_layernorm.weight"] = published_tensors["model.norm.weight"].clone()
            content = {"checkpoint_version": 3.0, "model": {"language_model": model}, **(more or {})}
            if args is not None:
                content["args"] = args
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            (folder / iteration / name).mkdir(parents=True)
            torch.save(content, folder / iteration / name / "model_optim_rng.pt")
    text = iteration if iteration == "release" else str(int(iteration.removeprefix("iter_")))
    (folder / "latest_checkpointed_iteration.txt").write_text(text)
    return folder


def same_content(one: Any, other: Any, where: str = "") -> None:
    """Assert that two checkpoints hold the same, bit for bit, under the same names in the same places."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            same_content(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where
