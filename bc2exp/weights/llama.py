"""A Baichuan2 of the 7B kind as a Llama: transformers' own class computes it, with no code from the folder.

Query, key and value stand alone, and the head has the rows that NormHead would have made of it: a Llama
multiplies by them as they are. The 13B kind is no Llama: its attention has linear biases (ALiBi) in place of
rotary positions, and transformers' Llama has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bc2exp.config.weight_files import DEFAULT_EPS, DEFAULT_MAX_POSITIONS, DEFAULT_THETA, SHAPE_FIELDS
from bc2exp.weights.layout import Part, model_shapes, whole


def llama_plan(shape: Mapping[str, Any]) -> dict[str, tuple[Part, ...]]:
    """Every tensor of the folder, in the order of the network. Raises ValueError for the 13B kind."""
    if shape["position"] != "rope":
        raise ValueError(
            "a Baichuan2 of the 13B kind cannot be written as a Llama: its attention has linear biases "
            "(ALiBi), and Llama has rotary positions"
        )
    plan: dict[str, tuple[Part, ...]] = {}
    for name, size in model_shapes(shape).items():
        head = name == "lm_head.weight"
        plan[name if head else f"model.{name}"] = (replace(whole(name, size), unit=head),)
    return plan


def to_config(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the Llama; `shape` as for `hf_layout.to_config`."""
    kind = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: shape[ours] for ours, theirs in SHAPE_FIELDS.items()},
        "num_key_value_heads": shape["num_heads"],
        "head_dim": shape["hidden_size"] // shape["num_heads"],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": shape.get("max_positions", DEFAULT_MAX_POSITIONS),
        "rms_norm_eps": shape.get("rms_norm_eps", DEFAULT_EPS),
        "rope_theta": shape.get("rope_theta", DEFAULT_THETA),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.get("rope_theta", DEFAULT_THETA)},
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": kind,
        "dtype": kind,
    }
