"""What of a Baichuan2 may be cut among ranks, and how: data beside the model, which knows none of it.

Over tensor-parallel ranks a weight is cut along one dim, or every rank has the whole. Over the stages of a
pipeline it belongs to a layer, which lies in one stage; embedding and head lie in the first and the last.
"""

from __future__ import annotations

from enum import Enum
from itertools import pairwise


class Cut(Enum):
    """The dim of a weight along which tensor-parallel ranks divide it; None: every rank has the whole."""

    whole = None
    rows = 0
    columns = 1

    @property
    def dim(self) -> int | None:
        """The dim, 0 or 1."""
        return self.value


# Rows of q, k and v are heads in order, so a rank's rows are its heads. Gate and up are cut alike, and down
# and o along the dim that meets them: between the two matrices of a pair a rank needs nothing of the others.
TENSOR_CUTS = {
    "embed_tokens.weight": Cut.rows,
    "input_layernorm.weight": Cut.whole,
    "self_attn.q_proj.weight": Cut.rows,
    "self_attn.k_proj.weight": Cut.rows,
    "self_attn.v_proj.weight": Cut.rows,
    "self_attn.o_proj.weight": Cut.columns,
    "post_attention_layernorm.weight": Cut.whole,
    "mlp.gate_proj.weight": Cut.rows,
    "mlp.up_proj.weight": Cut.rows,
    "mlp.down_proj.weight": Cut.columns,
    "norm.weight": Cut.whole,
    "lm_head.weight": Cut.rows,
}
"""How each weight is cut, by its name without `layers.N.`"""


def tensor_cut(name: str) -> Cut:
    """How the parameter `name` is cut over tensor-parallel ranks."""
    return TENSOR_CUTS[name.split(".", 2)[2] if name.startswith("layers.") else name]


def span(length: int, parts: int, index: int) -> slice:
    """The part `index` of `length` elements in `parts` consecutive ones: all of one size, the last ones less.

    This is how FSDP2 cuts, too.
    """
    size = -(-length // parts)
    return slice(min(index * size, length), min((index + 1) * size, length))


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """The layers of each stage, in order. Where they do not come out even the first stages have one more, as
    the last one has the head."""
    size, more = divmod(num_layers, num_stages)
    starts = [stage * size + min(stage, more) for stage in range(num_stages + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def stage_of(name: str, num_layers: int, num_stages: int) -> int:
    """The stage that holds the parameter `name`."""
    if name.startswith("layers."):
        layer = int(name.split(".")[1])
        return next(i for i, layers in enumerate(stage_layers(num_layers, num_stages)) if layer in layers)
    return 0 if name.startswith("embed_tokens.") else num_stages - 1
