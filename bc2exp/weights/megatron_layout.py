"""What ModelLink (Megatron) calls things in its shards, and which part of a model each shard has.

One file a rank: tensor-parallel rank t of stage p. A rank's rows of query, key and value stand head by head,
`[q0 k0 v0 | q1 k1 v1 | ...]`; gate and up are one matrix where they are merged, the rank's gate first; the
vocabulary is padded to a multiple of `vocab_divisible_by` times the tensor-parallel ranks with copies of its
last rows. Stages have equal numbers of layers, counted from 0 in each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bc2exp.config.convert import MERGED_NAMES
from bc2exp.weights.layout import Part

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
_FINAL_NORM = "encoder.final_layernorm.weight"

_ALIASES = (
    (r"^transformer\.", "encoder."),
    (r"^encoder\.final_norm\.", "encoder.final_layernorm."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_norm\.", ".post_attention_layernorm."),
    (r"\.mlp\.down_proj\.", ".mlp.dense_4h_to_h."),
)
"""Names of other versions, and ours."""
_NO_WEIGHTS = re.compile(r"\._extra_state$|rotary_(pos_)?emb\.inv_freq$")


def rank_folder(tensor_rank: int, stage: int, stages: int) -> str:
    """The folder of a rank."""
    return f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")


def rank_plan(
    shape: Mapping[str, Any],
    *,
    tensor_rank: int,
    tensor: int,
    stage: int,
    pipeline: int,
    merged: str | None,
    padded: int,
) -> dict[str, tuple[Part, ...]]:
    """The tensors of one rank.

    Args:
        shape: of the model.
        tensor_rank, tensor, stage, pipeline: the rank, and how many there are.
        merged: what gate and up in one are called (see `MERGED_NAMES`); None: they are two.
        padded: rows of embedding and head with the padding.
    """
    hidden, heads = shape["hidden_size"], shape["num_heads"]
    head_dim, wide = hidden // heads, (0, hidden)
    first = tensor_rank == 0  # what every rank has is read from the first

    def cut(size: int) -> tuple[int, int]:
        return size // tensor * tensor_rank, size // tensor * (tensor_rank + 1)

    plan: dict[str, tuple[Part, ...]] = {}
    if stage == 0:
        plan[EMBEDDING] = _rows_of_vocabulary(
            "embed_tokens.weight", shape["vocab_size"], padded, cut(padded), wide
        )
    layers = shape["num_layers"] // pipeline
    for index in range(layers):
        theirs, ours = f"encoder.layers.{index}", f"layers.{stage * layers + index}"
        plan[f"{theirs}.input_layernorm.weight"] = (
            Part(f"{ours}.input_layernorm.weight", wide, None, repeated=not first),
        )
        plan[f"{theirs}.self_attention.query_key_value.weight"] = tuple(
            Part(f"{ours}.self_attn.{kind}_proj.weight", (head * head_dim, (head + 1) * head_dim), wide)
            for head in range(*cut(heads))
            for kind in "qkv"
        )
        plan[f"{theirs}.self_attention.dense.weight"] = (
            Part(f"{ours}.self_attn.o_proj.weight", wide, cut(hidden)),
        )
        plan[f"{theirs}.post_attention_layernorm.weight"] = (
            Part(f"{ours}.post_attention_layernorm.weight", wide, None, repeated=not first),
        )
        inner = cut(shape["intermediate_size"])
        gate, up = (Part(f"{ours}.mlp.{kind}_proj.weight", inner, wide) for kind in ("gate", "up"))
        if merged is None:
            plan[f"{theirs}.mlp.gate_proj.weight"] = (gate,)
            plan[f"{theirs}.mlp.dense_h_to_4h.weight"] = (up,)
        else:
            plan[f"{theirs}.mlp.{merged}.weight"] = (gate, up)
        plan[f"{theirs}.mlp.dense_4h_to_h.weight"] = (Part(f"{ours}.mlp.down_proj.weight", wide, inner),)
    if stage == pipeline - 1:
        plan[_FINAL_NORM] = (Part("norm.weight", wide, None, repeated=not first),)
        plan[HEAD] = _rows_of_vocabulary("lm_head.weight", shape["vocab_size"], padded, cut(padded), wide)
    return plan


def _rows_of_vocabulary(
    name: str, size: int, padded: int, rows: tuple[int, int], columns: tuple[int, int]
) -> tuple[Part, ...]:
    """Some rows of a padded matrix of the vocabulary, below whose rows the last ones stand once more."""
    start, stop = rows
    added = padded - size
    own = Part(name, (start, min(stop, size)), columns)
    copies = Part(name, (max(start, size) - added, stop - added), columns, repeated=True)
    return tuple(part for part in (own, copies) if part.num_rows > 0)


def plain_names(names: Mapping[str, Any]) -> dict[str, str]:
    """{name in a shard, below language_model: the same in this layout}; what is no weight is left out."""
    found = {}
    for theirs in names:
        ours = theirs
        for pattern, replacement in _ALIASES:
            ours = re.sub(pattern, replacement, ours)
        if not _NO_WEIGHTS.search(ours):
            found[theirs] = ours
    if any(name.endswith(".mlp.gate_proj.weight") for name in found.values()):
        up = (".mlp.up_proj.", ".mlp.dense_h_to_4h.")
        found = {theirs: ours.replace(*up) for theirs, ours in found.items()}
    return found


def merged_name(names: Iterable[str]) -> str | None:
    """What gate and up in one are called in a shard; None where they are two."""
    ends = {name.rpartition(".mlp.")[2] for name in names if ".mlp." in name}
    if "gate_proj.weight" in ends:
        return None
    return next((name for name in MERGED_NAMES if f"{name}.weight" in ends), MERGED_NAMES[0])


def nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a rank in the dictionaries that ModelLink has: below `encoder` names stay whole."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "encoder":
            found.setdefault(part, {})[rest] = tensor
            continue
        node, *between, last = found, *name.split(".")
        for key in between:
            node = node.setdefault(key, {})
        node[last] = tensor
    return found
