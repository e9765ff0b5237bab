"""What a published Baichuan2 folder calls things: parameters, their shapes, the fields of config.json.

The names are the model's own with `model.` in front, but for two: the head has no prefix, and the query,
key and value projections of a layer are one matrix, `W_pack`, rows [q | k | v], each in order of heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

PACKED = ("q_proj", "k_proj", "v_proj")
"""The projections in `W_pack`, in the order of its thirds."""

_SHAPE_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_DEFAULT_MAX_POSITIONS = 4096
_DEFAULT_EPS = 1e-6
_DEFAULT_THETA = 10000.0
_BAICHUAN1_VOCAB_SIZE = 64000


def published_name(name: str) -> tuple[str, int | None]:
    """The published name of the parameter `name`, and which third of a W_pack it is (None: it is none)."""
    for third, projection in enumerate(PACKED):
        if name.endswith(f".{projection}.weight"):
            return f"model.{name.replace(projection, 'W_pack')}", third
    return (name if name.startswith("lm_head.") else f"model.{name}"), None


def published_shapes(shape: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published folder and its shape, in the order of the network."""
    vocab, hidden, inner = shape["vocab_size"], shape["hidden_size"], shape["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(shape["num_layers"]):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.self_attn.W_pack.weight"] = (3 * hidden, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def is_derived(name: str) -> bool:
    """Whether a tensor can be computed from the shape: some programs write the rotary frequencies out."""
    return re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name) is not None


def to_config(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a model of this shape.

    `shape` has the keyword arguments of `Baichuan2` (those with defaults may be missing) and perhaps
    `max_positions`, the longest sequence (default 4096); other keys are not looked at.

    The published format has no field for the kind of positions: a folder with `max_position_embeddings`
    is of the 7B kind (rope), one without it of the 13B kind (ALiBi). `rope_theta` is our own field and
    is written only where it differs from the 10000 built into the published code.
    """
    max_positions = shape.get("max_positions", _DEFAULT_MAX_POSITIONS)
    config: dict[str, Any] = {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "tokenizer_class": "BaichuanTokenizer",
        **{theirs: shape[ours] for ours, theirs in _SHAPE_FIELDS.items()},
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_max_length": max_positions,
        "rms_norm_eps": shape.get("rms_norm_eps", _DEFAULT_EPS),
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
        if shape.get("rope_theta", _DEFAULT_THETA) != _DEFAULT_THETA:
            config["rope_theta"] = shape["rope_theta"]
    return config


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The shape in a config.json, as keyword arguments of `Baichuan2`; the reverse of `to_config`.

    Raises ValueError where it is not of a Baichuan2, or lacks a size.
    """
    if config.get("model_type") != "baichuan":
        raise ValueError(f"config.json is of model_type {config.get('model_type')!r}, not 'baichuan'")
    missing = [theirs for theirs in _SHAPE_FIELDS.values() if theirs not in config]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    if config["vocab_size"] == _BAICHUAN1_VOCAB_SIZE:
        # The first Baichuan has the same model_type and names, but a plain head: it would load, wrongly.
        raise ValueError("config.json is of the first Baichuan (64,000 words), which has no NormHead")
    return {
        **{ours: config[theirs] for ours, theirs in _SHAPE_FIELDS.items()},
        "position": "rope" if "max_position_embeddings" in config else "alibi",
        "rms_norm_eps": config.get("rms_norm_eps", _DEFAULT_EPS),
        "rope_theta": config.get("rope_theta", _DEFAULT_THETA),
        "z_loss_weight": config.get("z_loss_weight", 0.0),
    }
