"""What a published Baichuan2 folder calls things: parameters, their shapes, the fields of config.json.

The names are the model's own with `model.` in front, but for two: the head has no prefix, and the query,
key and value projections of a layer are one matrix, `W_pack`, rows [q | k | v], each in order of heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from bc2exp.config.weight_files import (
    DEFAULT_EPS,
    DEFAULT_MAX_POSITIONS,
    DEFAULT_THETA,
    SHAPE_FIELDS,
    shape_of,
)
from bc2exp.weights.layout import Part, model_shapes, stored_shape, whole

PACKED = ("q_proj", "k_proj", "v_proj")
"""The projections in `W_pack`, in the order of its thirds."""

GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
"""generation_config.json of a folder whose source has none."""


def published_name(name: str) -> tuple[str, int | None]:
    """The published name of the parameter `name`, and which third of a W_pack it is (None: it is none)."""
    for third, projection in enumerate(PACKED):
        if name.endswith(f".{projection}.weight"):
            return f"model.{name.replace(projection, 'W_pack')}", third
    return (name if name.startswith("lm_head.") else f"model.{name}"), None


def published_plan(shape: Mapping[str, Any]) -> dict[str, tuple[Part, ...]]:
    """Every tensor of a published folder and what of the model is in it, in the order of the network."""
    plan: dict[str, tuple[Part, ...]] = {}
    for name, size in model_shapes(shape).items():
        theirs, _ = published_name(name)
        plan[theirs] = (*plan.get(theirs, ()), whole(name, size))
    return plan


def published_shapes(shape: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published folder and its shape, in the order of the network."""
    return {name: stored_shape(parts) for name, parts in published_plan(shape).items()}


def is_derived(name: str) -> bool:
    """Whether a tensor can be computed from the shape: some programs write the rotary frequencies out."""
    return re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name) is not None


def to_config(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a model of this shape.

    `shape` has the keyword arguments of `Baichuan2` (those with defaults may be missing) and perhaps
    `max_positions`, the longest sequence (default 4096); other keys are not looked at. How the kind of
    positions is told, see `weight_files.shape_of`; `rope_theta` is written only where it differs from the
    10000 built into the published code.
    """
    max_positions = shape.get("max_positions", DEFAULT_MAX_POSITIONS)
    config: dict[str, Any] = {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "tokenizer_class": "BaichuanTokenizer",
        **{theirs: shape[ours] for ours, theirs in SHAPE_FIELDS.items()},
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_max_length": max_positions,
        "rms_norm_eps": shape.get("rms_norm_eps", DEFAULT_EPS),
        "z_loss_weight": shape.get("z_loss_weight", 0.0),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if shape["position"] == "rope":
        config["max_position_embeddings"] = max_positions
        if shape.get("rope_theta", DEFAULT_THETA) != DEFAULT_THETA:
            config["rope_theta"] = shape["rope_theta"]
    return config


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The shape in a config.json, as keyword arguments of `Baichuan2`; the reverse of `to_config`.

    Raises ValueError where it is not of a Baichuan2, or lacks a size.
    """
    return shape_of(config)
