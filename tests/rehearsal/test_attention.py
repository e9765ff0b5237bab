"""The kernels of `npu_fusion_attention`, in every layout and mode, against torch's attention on the CPU."""

# ruff: noqa: I001  (the devices come before torch)
from __future__ import annotations

from tests.rehearsal.against_cpu import TYPES, compare

import math

import pytest
import torch
import torch_npu
from torch.nn import functional as F

from bc2exp.hardware.rehearsal import census

B, N, S, D = 2, 4, 24, 16
SCALE = D**-0.5
CAUSAL = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
TO_LAYOUT = {
    "BNSD": lambda x: x,
    "BSND": lambda x: x.transpose(1, 2),
    "BSH": lambda x: x.transpose(1, 2).flatten(2),
    "SBH": lambda x: x.permute(2, 0, 1, 3).flatten(2),
    "TND": lambda x: x.transpose(1, 2).flatten(0, 1),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def qkv(kv_heads=N, keys=S):
    return torch.randn(B, N, S, D), torch.randn(B, kv_heads, keys, D), torch.randn(B, kv_heads, keys, D)


def fused(layout="BNSD", version="", **options):
    operator = getattr(torch_npu, f"npu_fusion_attention{version}")
    options = {k: v.npu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if layout == "TND":
        options |= {"actual_seq_qlen": [S, 2 * S], "actual_seq_kvlen": [S, 2 * S]}
    return lambda q, k, v: operator(q, k, v, N, layout, scale=SCALE, **options)[0]


def reference(mask=None, bias=None, **options):
    """`mask` is True where attention is allowed, as in torch."""
    total = bias
    if mask is not None:
        blocked = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        total = blocked if total is None else total + blocked
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=total, **options)


def causal(queries=S, keys=S, shift=0):
    return torch.ones(queries, keys, dtype=torch.bool).tril(shift)


def alibi():
    slopes = torch.tensor([2.0 ** -(2 * i + 1) for i in range(N)])
    distance = (torch.arange(S)[None, :] - torch.arange(S)[:, None]).abs()
    return slopes, -slopes[:, None, None] * distance


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("layout", TO_LAYOUT)
def test_every_layout(layout, kind):
    how = {"kind": kind, "convert": TO_LAYOUT[layout]}
    compare(reference(causal()), fused(layout, atten_mask=CAUSAL, sparse_mode=2), *qkv(), **how)
    grouped = reference(causal(), enable_gqa=True)
    compare(grouped, fused(layout, atten_mask=CAUSAL, sparse_mode=3), *qkv(kv_heads=2), **how)


def test_a_mask_is_true_where_nothing_is_seen():
    allowed = torch.rand(B, 1, S, S) > 0.3
    allowed[..., 0] = True
    compare(reference(allowed), fused(atten_mask=~allowed), *qkv())
    compare(reference(allowed[:1]), fused(atten_mask=(~allowed[0, 0]).byte(), sparse_mode=1), *qkv())


def test_sparse_modes_with_more_keys_than_queries():
    keys = S + 8
    compare(reference(causal(S, keys)), fused(atten_mask=CAUSAL, sparse_mode=2), *qkv(keys=keys))
    compare(reference(causal(S, keys, 8)), fused(atten_mask=CAUSAL, sparse_mode=3), *qkv(keys=keys))
    band = causal(S, keys, 8 + 2) & ~causal(S, keys, 8 - 5 - 1)
    around = fused(atten_mask=CAUSAL, sparse_mode=4, pre_tockens=5, next_tockens=2)
    compare(reference(band), around, *qkv(keys=keys))
    band = causal(S, S, 0) & ~causal(S, S, -5 - 1)
    none = torch.zeros(S, S, dtype=torch.bool)
    compare(reference(band), fused(atten_mask=none, pre_tockens=5, next_tockens=0), *qkv())


def test_without_a_mask_nothing_is_masked():
    compare(reference(), fused(sparse_mode=2), *qkv())


def test_a_bias_is_added_before_the_scale():
    _, bias = alibi()
    scaled = fused(pse=bias[None] / SCALE, atten_mask=CAUSAL, sparse_mode=2)
    compare(reference(causal(), bias), scaled, *qkv())
    unscaled = reference(causal(), bias * SCALE)
    compare(unscaled, fused(pse=bias[None], atten_mask=CAUSAL, sparse_mode=2), *qkv())


def test_the_bias_of_version_2():
    slopes, bias = alibi()
    mask = {"atten_mask": CAUSAL, "sparse_mode": 2}
    root = -slopes[:, None, None] * (bias / -slopes[:, None, None]).sqrt()
    wanted = reference(causal(), bias)
    compare(wanted, fused(version="_v2", pse=bias[None], pse_type=0, **mask), *qkv())
    compare(wanted, fused(version="_v2", pse=bias[None] / SCALE, pse_type=1, **mask), *qkv())
    compare(wanted, fused(version="_v2", pse=slopes, pse_type=2, **mask), *qkv())
    compare(wanted, fused(version="_v2", pse=slopes.expand(B, N).contiguous(), pse_type=2, **mask), *qkv())
    compare(reference(causal(), root), fused(version="_v2", pse=slopes, pse_type=3, **mask), *qkv())


def test_torch_s_own_attention_is_fused_unless_the_mask_is_float():
    def sdpa(**options):
        options = {k: v.npu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)

    census.operators.clear()
    compare(reference(causal()), sdpa(is_causal=True), *qkv())
    compare(reference(causal()), sdpa(attn_mask=causal()), *qkv())
    assert census.operators["npu::npu_fusion_attention_v3"].total() == 2
    compare(reference(bias=alibi()[1]), sdpa(attn_mask=alibi()[1]), *qkv())
    assert census.operators["npu::npu_fusion_attention_v3"].total() == 2


def test_what_is_not_covered_or_wrong_is_refused():
    q = torch.ones(1, 2, 8, 16, device="npu")

    def attend(**options):
        return torch_npu.npu_fusion_attention(q, q, q, 2, "BNSD", **options)[0]

    with pytest.raises(NotImplementedError, match="refuses npu::npu_fusion_attention: dropout"):
        attend(keep_prob=0.9)
    bias = torch.ones(1, 2, 8, 8, device="npu", requires_grad=True)
    with pytest.raises(RuntimeError, match="invalid gradient at index 3"):
        attend(pse=bias).sum().backward()
    with pytest.raises(ValueError, match="2048"):
        attend(atten_mask=torch.ones(8, 8, dtype=torch.bool, device="npu"), sparse_mode=2)
    with pytest.raises(ValueError, match="True = masked out"):
        attend(atten_mask=~CAUSAL.npu(), sparse_mode=2)
