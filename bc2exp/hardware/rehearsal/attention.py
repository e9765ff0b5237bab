"""`npu::npu_fusion_attention` and its second and third version, on host memory.

After the operators' public documentation: computed in fp32 and rounded once to the arguments' type. The
kernels stand below autograd, so that torch_npu's own derivatives, fake kernels and DTensor rules run on top.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bc2exp.hardware.rehearsal import census
from bc2exp.hardware.rehearsal.memory import gradients, host_alias, to_device

NAME = "npu::npu_fusion_attention"
UNLIMITED = 2147483647
COMPRESSED = 2048
"""Sparse modes 2, 3 and 4 take the causal mask of this size, whatever the sequence length."""
ATTENTION_TYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class AttentionOptions:
    """Everything but query, key and value, on the host."""

    heads: int
    layout: str
    pse: Tensor | None = None
    pse_type: int = 1
    atten_mask: Tensor | None = None
    scale: float = 1.0
    pre_tokens: int = UNLIMITED
    next_tokens: int = UNLIMITED
    sparse_mode: int = 0
    q_ends: list[int] = field(default_factory=list)  # TND: cumulative lengths without the leading 0
    kv_ends: list[int] = field(default_factory=list)
    position_shift: int = 0  # kv_start_idx - q_start_idx, for slopes


@functools.cache
def _compressed_causal_mask() -> Tensor:
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)


def _masked_out(queries: int, keys: int, options: AttentionOptions) -> Tensor | None:
    """True where attention is forbidden. Without atten_mask nothing is masked, whatever sparse_mode says."""
    mask, mode = options.atten_mask, options.sparse_mode
    if mask is None:
        return None
    distance = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]  # key position - query position
    if mode in (0, 1):
        if options.layout == "TND":
            raise census.refuse(NAME, f"sparse_mode {mode} with a mask in layout TND")
        if mask.shape[-2:] != (queries, keys):
            raise ValueError(f"{NAME}: atten_mask {tuple(mask.shape)} for {queries} x {keys} scores")
        mask = mask.bool()
        if mode == 1:
            return mask
        return mask | (distance > options.next_tokens) | (distance < -options.pre_tokens)
    if mode not in (2, 3, 4):
        raise census.refuse(NAME, f"sparse_mode {mode}")
    if tuple(mask.shape[-2:]) != (COMPRESSED, COMPRESSED) or mask.numel() != COMPRESSED**2:
        raise ValueError(f"{NAME}: sparse_mode {mode} needs the {COMPRESSED}x{COMPRESSED} mask")
    if not torch.equal(mask.bool().view(COMPRESSED, COMPRESSED), _compressed_causal_mask()):
        raise ValueError(f"{NAME}: sparse_mode {mode} needs ones(...).triu(1), True = masked out")
    if mode == 2:
        return distance > 0
    distance = distance - (keys - queries)  # modes 3 and 4 align the bottom right corners
    if mode == 3:
        return distance > 0
    return (distance > options.next_tokens) | (distance < -options.pre_tokens)


def _slope_bias(slopes: Tensor, queries: int, keys: int, options: AttentionOptions) -> Tensor:
    """ALiBi made in the kernel: -slope * |distance|, or -slope * sqrt(|distance|) for pse_type 3."""
    distance = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] + options.position_shift
    distance = distance.abs().float()
    if options.pse_type == 3:
        distance = distance.sqrt()
    return -slopes.float()[..., None, None] * distance  # (N, Sq, Skv) or (B, N, Sq, Skv)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of (B, N, S, D) tensors -> output, row maximum, row sum of exponentials; all fp32."""
    query, key, value = query.float(), key.float(), value.float()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2)
    queries, keys = scores.shape[-2:]
    if options.pse is None:
        scores = scores * options.scale
    elif options.pse_type == 1:
        scores = (scores + options.pse.float()) * options.scale
    elif options.pse_type == 0:
        scores = scores * options.scale + options.pse.float()
    else:
        scores = scores * options.scale + _slope_bias(options.pse, queries, keys, options)
    mask = _masked_out(queries, keys, options)
    if mask is not None:
        scores = scores.masked_fill(mask, torch.finfo(torch.float32).min)  # a fully masked row attends evenly
    maximum = scores.amax(-1, keepdim=True).detach()
    weights = (scores - maximum).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights / total) @ value, maximum, total


def _split_heads(tensor: Tensor, dim: int, layout: str) -> Tensor:
    """Any dense layout as (B, N, S, D)."""
    if layout == "BNSD":
        return tensor
    if layout == "BSND":
        return tensor.transpose(1, 2)
    tensor = tensor.unflatten(2, (-1, dim))
    return tensor.transpose(1, 2) if layout == "BSH" else tensor.permute(1, 2, 0, 3)


def _merge_heads(tensor: Tensor, layout: str) -> Tensor:
    """(B, N, S, D) in a dense layout."""
    if layout == "BNSD":
        return tensor
    if layout == "BSND":
        return tensor.transpose(1, 2)
    return (tensor.transpose(1, 2) if layout == "BSH" else tensor.permute(2, 0, 1, 3)).flatten(2)


def attention(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """npu_fusion_attention on host tensors -> output, softmax_max, softmax_sum. Differentiable."""
    if options.layout == "TND":
        pieces, q_start, kv_start = [], 0, 0
        for q_end, kv_end in zip(options.q_ends, options.kv_ends, strict=True):
            q, k, v = query[q_start:q_end], key[kv_start:kv_end], value[kv_start:kv_end]
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            found = _attend(q, k, v, options)
            pieces.append([part[0].transpose(0, 1) for part in found])
            q_start, kv_start = q_end, kv_end
        output, maximum, total = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    else:
        dim = query.shape[-1] // (options.heads if options.layout in ("BSH", "SBH") else 1)
        q, k, v = (_split_heads(part, dim, options.layout) for part in (query, key, value))
        found = _attend(q, k, v, options)
        output, maximum, total = _merge_heads(found[0], options.layout), found[1], found[2]
    eight = (*maximum.shape[:-1], 8)  # the statistics are stored eight times, as on the device
    return (
        output.to(query.dtype).contiguous(),
        maximum.expand(eight).contiguous(),
        total.expand(eight).contiguous(),
    )


def _check(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> None:
    if not query.dtype == key.dtype == value.dtype or query.dtype not in ATTENTION_TYPES:
        raise TypeError(f"{NAME}: query, key and value have types {query.dtype}, {key.dtype}, {value.dtype}")
    head_axis = {"BNSD": 1, "BSND": 2, "TND": 1, "BSH": None, "SBH": None}
    if options.layout not in head_axis:
        raise ValueError(f"{NAME}: unknown input_layout {options.layout!r}")
    axis = head_axis[options.layout]
    if axis is not None and (query.shape[axis] != options.heads or options.heads % key.shape[axis]):
        raise ValueError(
            f"{NAME}: head_num {options.heads}, query {query.shape[axis]}, key {key.shape[axis]} heads"
        )
    if options.layout == "TND" and not (options.q_ends and options.kv_ends):
        raise ValueError(f"{NAME}: layout TND needs actual_seq_qlen and actual_seq_kvlen")
    if options.layout == "TND" and (options.q_ends[-1], options.kv_ends[-1]) != (
        query.shape[0],
        key.shape[0],
    ):
        raise ValueError(
            f"{NAME}: actual_seq_qlen and actual_seq_kvlen are cumulative and end at the token counts"
        )
    if options.atten_mask is not None and options.atten_mask.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"{NAME}: atten_mask must be bool or uint8, not {options.atten_mask.dtype}")
    if options.pse is None:
        return
    slopes = options.pse_type in (2, 3)
    if options.pse.dtype != (torch.float32 if slopes else query.dtype):
        raise TypeError(f"{NAME}: pse has type {options.pse.dtype} with pse_type {options.pse_type}")
    if slopes != (options.pse.dim() <= 2):
        raise ValueError(f"{NAME}: pse of shape {tuple(options.pse.shape)} with pse_type {options.pse_type}")
    if not slopes and options.layout == "TND":
        raise census.refuse(NAME, "a pse tensor in layout TND")
    if not slopes and options.pse.shape[-1] > 1024 == options.pse.shape[-2]:
        raise census.refuse(NAME, "the compressed pse of 1024 rows")


UNSUPPORTED = ["padding_mask", "prefix", "sink", "dropout_mask", "query_rope", "key_rope", "softmax_layout"]


def _integers(values: Any) -> list[int]:
    return [int(v) for v in values] if values is not None else []


def _options(heads: int, layout: str, arguments: dict[str, Any]) -> AttentionOptions:
    """Options from the keyword arguments of any version of the operator; version 1 misspells two of them."""
    for argument in UNSUPPORTED:
        if arguments.get(argument) not in (None, ""):
            raise census.refuse(NAME, argument)
    if arguments.get("keep_prob", 1.0) != 1.0:
        raise census.refuse(NAME, "dropout (keep_prob below 1)")
    pse, mask = arguments.get("pse"), arguments.get("atten_mask")
    q_start, kv_start = _integers(arguments.get("q_start_idx")), _integers(arguments.get("kv_start_idx"))
    return AttentionOptions(
        heads=heads,
        layout=layout,
        pse=None if pse is None else host_alias(pse),
        pse_type=arguments.get("pse_type", 1),
        atten_mask=None if mask is None else host_alias(mask),
        scale=arguments.get("scale", arguments.get("scale_value", 1.0)),
        pre_tokens=arguments.get("pre_tockens", arguments.get("pre_tokens", UNLIMITED)),
        next_tokens=arguments.get("next_tockens", arguments.get("next_tokens", UNLIMITED)),
        sparse_mode=arguments.get("sparse_mode", 0),
        q_ends=_integers(arguments.get("actual_seq_qlen")),
        kv_ends=_integers(arguments.get("actual_seq_kvlen")),
        position_shift=sum(kv_start) - sum(q_start),
    )


def _no_dropout_state() -> tuple[int, int, int]:
    return 0, 0, 0  # seed, offset, number of mask elements


def _no_dropout_state_tensors() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)


def _version(
    version: str, empty_gradients: int, tail: Callable[[], tuple[Any, ...]]
) -> dict[str, Callable[..., Any]]:
    """Forward and backward of one version; `tail` makes the outputs after the empty softmax_out."""
    forward_op = getattr(torch.ops.npu, f"npu_fusion_attention{version}").default
    names = [argument.name for argument in forward_op._schema.arguments]

    def forward(
        query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        arguments = dict(zip(names[5:], args, strict=False)) | kwargs
        options = _options(head_num, input_layout, arguments)
        q, k, v = (host_alias(part) for part in (query, key, value))
        _check(q, k, v, options)
        results = [to_device(part, query.device) for part in attention(q, k, v, options)]
        return (*results, query.new_empty(0), *tail())

    def backward(
        query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        options = _options(head_num, input_layout, kwargs)
        host = [host_alias(part) for part in (query, key, value)]
        found = gradients(lambda q, k, v: attention(q, k, v, options)[0], host, host_alias(dy))
        empties = [query.new_empty(0) for _ in range(empty_gradients)]
        return (*(to_device(part, query.device) for part in found), *empties)

    return {f"npu_fusion_attention{version}": forward, f"npu_fusion_attention_grad{version}": backward}


def kernels() -> dict[str, Callable[..., Any]]:
    """The kernels by the operators' names, without their namespace."""
    return {
        **_version("", 2, _no_dropout_state),
        **_version("_v2", 4, _no_dropout_state),
        **_version("_v3", 2, _no_dropout_state_tensors),
    }
