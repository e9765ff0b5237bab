"""The GPU's operations against their eager twins: in plain form on this processor, on a GPU as they are.

FlexAttention has no backward on a CPU, so there the two functions it is given are put into plain attention.
"""

from __future__ import annotations

import pytest
import torch

from bc2exp.config.errors import UserError
from bc2exp.hardware import cuda, eager, get_backend
from bc2exp.model.positions import alibi_slopes, rope_tables
from tests.hardware.test_ops import assert_rounded_once, outputs_and_gradients, packed

BACKEND = get_backend("cuda")
OPS = BACKEND.ops
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EVERY = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="gpu", marks=ON_GPU)]


def settings(segments: bool, alibi: bool, length: int, device: str = "cpu", batch: int = 3, heads: int = 6):
    return {
        "segment_ids": packed(batch, length).to(device) if segments else None,
        "slopes": alibi_slopes(heads).to(device) if alibi else None,
    }


def materialised(q, k, v, *, segment_ids, slopes, scale):
    """Attention with the score and mask functions of FlexAttention applied to every pair."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    offset = num_keys - num_queries
    batch, heads = (torch.arange(size) for size in q.shape[:2])
    grid = torch.meshgrid(batch, heads, torch.arange(num_queries), torch.arange(num_keys), indexing="ij")
    scores = scale * (q.float() @ k.float().transpose(-1, -2))
    if slopes is not None:
        scores = cuda.alibi(slopes, offset)(scores, *grid)
    scores = scores.masked_fill(~cuda.visible(segment_ids, offset)(*grid), float("-inf"))
    return (scores.softmax(dim=-1) @ v.float()).to(q.dtype)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("num_queries", [90, 40])
def test_mask_and_bias_are_those_of_the_twin(alibi, segments, num_queries):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 6, 90, 16) for _ in range(3))
    tensors = [q[:, :, -num_queries:], k, v]
    given = settings(segments, alibi, 90)
    ours = outputs_and_gradients(materialised, tensors, **given)
    expected = outputs_and_gradients(eager.attention, tensors, **given)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", EVERY)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("num_queries", [1, 3, 200, 300])
@pytest.mark.parametrize("head_dim", [8, 16])
def test_attention_against_cached_keys_equals_its_twin(device, alibi, segments, num_queries, head_dim):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 6, 300, head_dim).to(device) for _ in range(3))
    given = {**settings(segments, alibi, 300, device), "scale": 0.3}
    with torch.no_grad():
        ours = OPS.attention(q[:, :, -num_queries:], k, v, **given)
        expected = eager.attention(q, k, v, **given)[:, :, -num_queries:]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_queries", [40, 64])
def test_causal_attention_and_its_gradients_equal_the_twin(dtype, num_queries):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 6, 64, 16).to(dtype) for _ in range(3))
    tensors = [q[:, :, -num_queries:], k, v]
    given = settings(False, False, 64)
    ours = outputs_and_gradients(OPS.attention, tensors, **given)
    expected = outputs_and_gradients(eager.attention, [tensor.float() for tensor in tensors], **given)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), theirs, rtol=tolerance, atol=tolerance)


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(("length", "head_dim"), [(7, 16), (600, 16), (600, 32), (512, 128)])
def test_attention_and_gradients_on_a_gpu_equal_the_twin(dtype, alibi, segments, length, head_dim):
    BACKEND.setup(0, 1)
    torch.manual_seed(0)
    tensors = [torch.randn(3, 6, length, head_dim).to("cuda", dtype) for _ in range(3)]
    given = settings(segments, alibi, length, "cuda")
    ours = outputs_and_gradients_on_gpu(OPS.attention, tensors, **given)
    expected = outputs_and_gradients_on_gpu(
        eager.attention, [tensor.float() for tensor in tensors], **given, dtype=dtype
    )
    tolerance = 5e-5 if dtype == torch.float32 else 3e-2
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=tolerance, atol=tolerance)


def outputs_and_gradients_on_gpu(attention, tensors, dtype=None, **given):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = attention(*leaves, scale=0.3, **given)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(
        "cuda", dtype or out.dtype
    )
    return [out, *torch.autograd.grad(out, leaves, direction.to(out.dtype))]


@ON_GPU
def test_the_bias_is_fp32_for_bf16_scores_on_a_gpu():
    # as in test_ops: in bf16 the bias of -257 would be -256, and two keys would draw
    q, k, v = (torch.zeros(1, 1, 600, 16, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    q[..., 0] = 16.0
    k[..., :-1, 0] = -512.0
    k[..., -1 - 257, 0] = 16.0
    v[..., -1 - 257, :] = 1.0
    slopes = torch.tensor([1.0], device="cuda")
    out = OPS.attention(q, k, v, segment_ids=None, slopes=slopes, scale=1.0)
    expected = torch.tensor([0.0, -1.0]).softmax(0)[1]
    torch.testing.assert_close(out[0, 0, -1, 0].float().cpu(), expected, rtol=4e-3, atol=0)


@ON_GPU
def test_long_alibi_attention_keeps_no_matrix_of_scores():
    BACKEND.setup(0, 1)
    length, heads = 4096, 40
    q, k, v = (torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    slopes = alibi_slopes(heads).to("cuda")
    OPS.attention(q, k, v, segment_ids=None, slopes=slopes, scale=0.1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    OPS.attention(q, k, v, segment_ids=None, slopes=slopes, scale=0.1)
    assert torch.cuda.max_memory_allocated() - before < heads * length * length // 4


def test_the_mask_of_a_forward_pass_is_made_once_and_of_other_ids_anew():
    masks = cuda._LastMask()
    ids = packed(3, 300)
    first = masks.get(ids, 300, 300, ids.device)
    assert masks.get(ids, 300, 300, ids.device) is first
    assert masks.get(ids, 100, 300, ids.device) is not first
    one, two = ids.clone(), ids.clone()
    assert masks.get(one, 300, 300, ids.device) is not masks.get(two, 300, 300, ids.device)
    kept = masks.get(ids, 300, 300, ids.device)
    ids[:, 150:] += 10  # the same tensor with other ids
    changed = masks.get(ids, 300, 300, ids.device)
    assert changed is not kept
    assert masks.get(None, 300, 300, ids.device) is not changed
    assert masks.get(None, 300, 300, ids.device) is masks.get(None, 300, 300, ids.device)


def test_blocks_that_no_query_sees_are_left_out():
    ids = torch.arange(1, 9).repeat_interleave(128)[None]
    mask = cuda._LastMask().get(ids, 1024, 1024, ids.device)
    assert (mask.kv_num_blocks + mask.full_kv_num_blocks).sum() == 8


@pytest.mark.parametrize("device", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradients_equal_the_twin(device, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 7, 64).to(device, dtype), (1 + torch.randn(64) / 4).to(device, dtype)
    results = []
    for norm in (OPS.rms_norm, eager.rms_norm):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = norm(*leaves, 1e-6)
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", EVERY)
def test_the_mean_of_bf16_is_taken_in_fp32(device):
    torch.manual_seed(0)
    x = torch.randn(64, 32).to(device, torch.bfloat16)
    exact = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert_rounded_once(OPS.rms_norm(x, torch.ones(32, dtype=torch.bfloat16, device=device), 1e-6), exact)


@ON_GPU
def test_the_other_operations_on_a_gpu_equal_those_on_the_processor():
    torch.manual_seed(0)
    gate, up, x = torch.randn(4, 64), torch.randn(4, 64), torch.randn(1, 2, 30, 8)
    torch.testing.assert_close(OPS.swiglu(gate.cuda(), up.cuda()).cpu(), eager.swiglu(gate, up))
    cos, sin = (table[:, None] for table in rope_tables(torch.arange(30)[None], 8, 10000.0))
    torch.testing.assert_close(OPS.rotary(x.cuda(), cos.cuda(), sin.cuda()).cpu(), eager.rotary(x, cos, sin))


@ON_GPU
def test_fp32_means_fp32_on_a_gpu():
    BACKEND.setup(0, 1)
    torch.manual_seed(0)
    a, b = torch.randn(512, 512, device="cuda"), torch.randn(512, 512, device="cuda")
    exact = a.double() @ b.double()
    assert ((a @ b).double() - exact).abs().max() < 1e-3  # TF32 errs by 1e-2


@ON_GPU
def test_the_backend_answers_on_a_gpu():
    BACKEND.setup(0, 1)
    held = torch.zeros(2**24, dtype=torch.uint8, device=BACKEND.device(0))
    BACKEND.synchronize()
    assert 2**24 <= BACKEND.peak_memory_bytes() < 2**40
    assert BACKEND.count() >= 1
    assert held.device == BACKEND.device(0)


def test_the_backend_answers():
    assert (BACKEND.name, BACKEND.collectives) == ("cuda", "nccl")
    assert BACKEND.device(3) == torch.device("cuda", 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_torch_that_sees_no_gpu_is_one_sentence():
    with pytest.raises(UserError, match=r"hardware\.backend=cuda: torch .* sees 0 GPUs and 2 are asked for"):
        BACKEND.setup(0, 2)
