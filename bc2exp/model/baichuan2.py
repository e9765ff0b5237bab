"""The Baichuan2 network: 7B (rotary positions) and 13B (ALiBi), in one plain file.

Block: x += attention(rms(x)); x += down(silu(gate(x)) * up(x)); then a final norm and NormHead. No bias,
no dropout, as many key heads as query heads. Read from the published modeling code.

Weights may be wider than what the model computes in (`Baichuan2.compute_in`): each is cast where it is used.

The model knows neither devices nor layouts. A rank may hold some of the heads, as shapes are read from
the tensors, or one stage of a pipeline: embedding, norm and head may be None, layers may be missing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bc2exp.hardware.base import Ops
from bc2exp.model.cache import Cache
from bc2exp.model.linear import Embedding, Linear
from bc2exp.model.loss import NORM_EPS, norm_head_loss_sum, row_norms
from bc2exp.model.positions import alibi_slopes, rope_tables, segment_positions
from bc2exp.model.room import Room

POSITIONS = ("rope", "alibi")
PADDING_ID = 0


class Context:
    """What every layer needs beside the hidden states, worked out once per forward.

    Neither bare arguments nor a dataclass: FSDP2 casts floating-point arguments of a wrapped layer, and
    those in containers and dataclasses, to the type it computes in, and the tables have to stay fp32.
    """

    def __init__(
        self,
        segment_ids: Tensor | None,
        rope: tuple[Tensor, Tensor] | None,
        slopes: Tensor | None,
        cache: Cache | None,
    ) -> None:
        self.segment_ids = segment_ids  # [batch, keys]
        self.rope = rope  # cos and sin, fp32 [batch or 1, 1, sequence, head_dim]
        self.slopes = slopes  # fp32 [heads of the whole model]
        self.cache = cache


class RMSNorm(nn.Module):
    """Root mean square normalisation of the last dim, with a learned factor."""

    def __init__(self, hidden_size: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal multi-head self-attention.

    `first_head` is the number, in the whole model, of the first head held here: it picks the slopes.
    """

    def __init__(self, hidden_size: int, head_dim: int, layer_index: int, ops: Ops, casts: Room) -> None:
        super().__init__()
        self.q_proj = Linear(hidden_size, hidden_size, casts)
        self.k_proj = Linear(hidden_size, hidden_size, casts)
        self.v_proj = Linear(hidden_size, hidden_size, casts)
        self.o_proj = Linear(hidden_size, hidden_size, casts)
        self.head_dim = head_dim
        self.first_head = 0
        self.layer_index = layer_index
        self.ops = ops

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if context.rope is not None:
            q, k = self.ops.rotary(q, *context.rope), self.ops.rotary(k, *context.rope)
        if context.cache is not None:
            k, v = context.cache.update(self.layer_index, k, v)
        slopes = context.slopes
        if slopes is not None:
            slopes = slopes[self.first_head : self.first_head + q.shape[1]]
        out = self.ops.attention(
            q, k, v, segment_ids=context.segment_ids, slopes=slopes, scale=1.0 / math.sqrt(self.head_dim)
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, sequence, heads * head_dim] to [batch, heads, sequence, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, ops: Ops, casts: Room) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, casts)
        self.up_proj = Linear(hidden_size, intermediate_size, casts)
        self.down_proj = Linear(intermediate_size, hidden_size, casts)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj.of_gated(self.ops.swiglu, self.gate_proj(x), self.up_proj(x))


class DecoderLayer(nn.Module):
    """One block of the network; hidden states [batch, sequence, hidden] in and out."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        head_dim: int,
        layer_index: int,
        eps: float,
        ops: Ops,
        casts: Room,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, eps, ops)
        self.self_attn = Attention(hidden_size, head_dim, layer_index, ops, casts)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps, ops)
        self.mlp = FeedForward(hidden_size, intermediate_size, ops, casts)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class NormHead(nn.Module):
    """The output head: hidden states against unit rows. The weight itself is never written to.

    For a shard of the vocabulary set `vocab_start` and `group` (see `norm_head_loss_sum`); the logits are
    then this shard's. Training adds z-loss; the trainer sets its `z_loss_ratio`, labels / real positions.
    `narrow_gradient`, and for tensors without values `every_row`: see there.
    """

    def __init__(self, vocab_size: int, hidden_size: int, z_loss_weight: float, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.vocab_size = vocab_size
        self.z_loss_weight = z_loss_weight
        self.z_loss_ratio: float | None = None
        self.vocab_start = 0
        self.every_row = False
        self.narrow_gradient: Room | None = None
        self.group: dist.ProcessGroup | None = None

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        real: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Logits, fp32 [..., vocabulary]; with labels [...] the loss sum, fp32 [1]. `real` is bool [...].

        `at` [n], positions counted through all dims but the last, asks for their logits alone,
        [n, vocabulary].
        """
        weight = self.weight
        if labels is None:
            if at is not None:
                hidden = hidden.flatten(0, -2)[at]
            # Dividing the logits instead of the rows spares a second copy of the weight.
            norms = row_norms(weight, hidden.dtype).clamp_min(NORM_EPS)
            return F.linear(hidden, weight.to(hidden.dtype)) / norms
        return norm_head_loss_sum(
            hidden.flatten(0, -2),
            weight,
            labels.flatten(),
            real=None if real is None else real.flatten(),
            z_loss_weight=self.z_loss_weight if self.training else 0.0,
            z_loss_ratio=self.z_loss_ratio,
            vocab_start=self.vocab_start,
            vocab_size=self.vocab_size,
            group=self.group,
            every_row=self.every_row,
            narrow_gradient=self.narrow_gradient,
            ops=self.ops,
        )


class Baichuan2(nn.Module):
    """Baichuan2 of any size. Raises ValueError for sizes that do not fit together.

    The weights are uninitialised until `initial.init_weights` or a load; building on the meta device is free.
    `shape` holds the keyword arguments of this constructor, less `ops`, as plain data.
    """

    embed_tokens: Embedding | None
    norm: RMSNorm | None
    lm_head: NormHead | None

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        position: str,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        z_loss_weight: float = 0.0,
        ops: Ops,
    ) -> None:
        super().__init__()
        head_dim = _head_dim(hidden_size, num_heads, position)
        self.shape: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "position": position,
            "rms_norm_eps": rms_norm_eps,
            "rope_theta": rope_theta,
            "z_loss_weight": z_loss_weight,
        }
        self.ops, self.casts = ops, Room()
        self.head_dim = head_dim
        self.embed_tokens = Embedding(vocab_size, hidden_size, padding_idx=PADDING_ID)
        # Keyed by the number in the whole model: a stage that drops layers keeps every other name.
        self.layers = nn.ModuleDict(
            {
                str(index): DecoderLayer(
                    hidden_size, intermediate_size, head_dim, index, rms_norm_eps, ops, self.casts
                )
                for index in range(num_layers)
            }
        )
        self.norm = RMSNorm(hidden_size, rms_norm_eps, ops)
        self.lm_head = NormHead(vocab_size, hidden_size, z_loss_weight, ops)

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits fp32 [batch, sequence, vocabulary], or with labels the loss SUM, fp32 [1].

        input_ids [batch, sequence] (without an embedding here: hidden states of the stage before).
        segment_ids [batch, sequence]: tokens see their own segment only; 0 is padding. With a cache they
        cover the cached positions too. labels[b, s] is the token that follows input_ids[b, s], or -100.
        positions [batch, sequence]: by default they count on from the cache, or restart in each segment.
        logits_at [n]: row * sequence + position of the only logits wanted, which come as [n, vocabulary].
        Without norm and head here: the hidden states for the next stage.
        """
        # The hidden states of the stage before may be this rank's part of the sequence; labels never are.
        length = (input_ids if labels is None else labels).shape[1]
        context = self._context(length, input_ids.device, segment_ids, positions, cache)
        hidden = input_ids if self.embed_tokens is None else self.embed_tokens(input_ids)
        for layer in self.layers.values():
            hidden = layer(hidden, context)
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.lm_head is None:
            return hidden
        real = None if labels is None or segment_ids is None else segment_ids != 0
        return self.lm_head(hidden, labels, real, logits_at)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Compute in `dtype`, whatever the type of the weights; their gradients have theirs."""
        assert self.embed_tokens is not None, "the type comes from the embedding, which another stage has"
        self.embed_tokens.compute_dtype = dtype

    def hold_gradients(self, *, narrow: bool) -> None:
        """In what form the next backward passes leave the gradients of the matrices; none may be there.

        `narrow`: as they are computed, so of a matrix in the type that is computed in, and of the embedding,
        where the device has sparse tensors, the rows that were used. That is for one backward pass: sums of
        several want the type of the weights, which all gradients have otherwise.
        """
        for parameter in self.parameters():
            assert parameter.grad is None
            if parameter.dim() > 1:
                parameter.grad_dtype = None if narrow else parameter.dtype
        if self.embed_tokens is not None:
            self.embed_tokens.sparse = narrow and self.ops.sparse_gradients
        if self.lm_head is not None:
            self.lm_head.narrow_gradient = (self.lm_head.narrow_gradient or Room()) if narrow else None

    def _context(
        self,
        length: int,
        device: torch.device,
        segment_ids: Tensor | None,
        positions: Tensor | None,
        cache: Cache | None,
    ) -> Context:
        if self.shape["position"] == "alibi":
            return Context(segment_ids, None, alibi_slopes(self.shape["num_heads"], device), cache)
        if positions is None and segment_ids is not None:
            positions = segment_positions(segment_ids)[:, -length:]
        elif positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + length, device=device)[None]
        cos, sin = rope_tables(positions, self.head_dim, self.shape["rope_theta"])
        return Context(segment_ids, (cos[:, None], sin[:, None]), None, cache)


def _head_dim(hidden_size: int, num_heads: int, position: str) -> int:
    if position not in POSITIONS:
        raise ValueError(f"position {position!r} is none of {', '.join(POSITIONS)}")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} cannot be divided among {num_heads} heads")
    head_dim = hidden_size // num_heads
    if position == "rope" and head_dim % 2:
        raise ValueError(f"rope turns pairs of dims, but {hidden_size} / {num_heads} = {head_dim} is odd")
    return head_dim


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, the padding row of the embedding included."""
    return sum(parameter.numel() for parameter in model.parameters())
