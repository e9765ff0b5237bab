"""The CPU's operations against their eager twins, values and gradients."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

from bc2exp.hardware import count_devices, cpu, cpu_attention, eager, get_backend
from bc2exp.model.positions import alibi_slopes, rope_tables

OPS = get_backend("cpu").ops


def packed(batch: int, length: int) -> torch.Tensor:
    """Ids of several segments a row, padding at the end; row 1 is one segment, row 2 only padding."""
    ids = torch.zeros(batch, length, dtype=torch.int64)
    ends = (0, length // 5, length // 2, 7 * length // 8)
    for number, (start, stop) in enumerate(itertools.pairwise(ends), start=1):
        ids[:, start:stop] = number
    ids[1:2] = 1
    ids[2:3] = 0
    return ids


def outputs_and_gradients(attention, tensors, **settings):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = attention(*leaves, scale=0.3, **settings)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, direction)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("length", [7, 600])
def test_attention_equals_its_eager_twin(dtype, alibi, segments, tiles, length, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles})
    torch.manual_seed(0)
    num_heads = 6
    tensors = [torch.randn(3, num_heads, length, 16).to(dtype) for _ in range(3)]
    settings = {
        "segment_ids": packed(3, length) if segments else None,
        "slopes": alibi_slopes(num_heads) if alibi else None,
    }
    ours = outputs_and_gradients(OPS.attention, tensors, **settings)
    # The twin gets the same values in fp32: bf16 may cost rounding of the result, never of the bias.
    expected = outputs_and_gradients(eager.attention, [tensor.float() for tensor in tensors], **settings)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("num_queries", [1, 3, 300])
def test_the_last_queries_against_cached_keys_equal_those_rows_of_the_whole(alibi, segments, num_queries):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 5, 400, 8) for _ in range(3))
    settings = {
        "segment_ids": packed(3, 400) if segments else None,
        "slopes": alibi_slopes(5) if alibi else None,
        "scale": 0.3,
    }
    whole = eager.attention(q, k, v, **settings)
    for attention in (OPS.attention, eager.attention):
        last = attention(q[:, :, -num_queries:], k, v, **settings)
        torch.testing.assert_close(last, whole[:, :, -num_queries:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 7])
def test_exponentials_by_rows_equal_those_of_all_at_once(monkeypatch, dtype, shifted, rows):
    monkeypatch.setattr(cpu, "EXPONENTIALS_BYTES", 4 * 50 * 3)  # three rows at a time
    torch.manual_seed(0)
    products, scale = 5 * torch.randn(rows, 50).to(dtype), torch.rand(50)
    shift = torch.randn(rows) if shifted else None
    wide = torch.exp(products.double() * scale - (0 if shift is None else shift[:, None]))
    for exponentials in (OPS.exponentials, eager.exponentials):
        found = products.clone()
        sums = exponentials(found, scale, shift)
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums, wide.sum(dim=1).float())
        torch.testing.assert_close(found, (wide * scale).to(dtype))


def test_no_scores_are_ever_as_large_as_all_of_a_sample():
    q = torch.empty(3, 6, 2048, 8)
    for rows, keys, hidden, bias in cpu_attention._blocks(
        q, q, torch.ones(1, 2048, dtype=torch.int64), alibi_slopes(6)
    ):
        count, seen = rows.stop - rows.start, keys.stop - keys.start
        assert count * 16 <= 2048
        assert bias.shape == (1, 6, count, seen)
        assert hidden.numel() <= count * seen
        for part in cpu_attention._parts(q, rows, keys):
            assert q[part].shape[:2].numel() * count * seen * 4 <= cpu_attention.SCORES_BYTES


@pytest.mark.parametrize("scores_bytes", [1, 64 * 64 * 4 * 3, 2**30])
def test_the_parts_are_every_sample_and_head_once(scores_bytes, monkeypatch):
    monkeypatch.setattr(cpu_attention, "SCORES_BYTES", scores_bytes)
    q = torch.zeros(5, 4, 64, 8)
    for part in cpu_attention._parts(q, slice(0, 64), slice(0, 64)):
        q[part] += 1
    assert (q == 1).all()


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 18])
def test_attention_is_the_same_however_many_heads_are_worked_on_at_once(heads, monkeypatch):
    torch.manual_seed(0)
    tensors = [torch.randn(3, 6, 200, 16) for _ in range(3)]
    settings = {"segment_ids": packed(3, 200), "slopes": alibi_slopes(6)}
    expected = outputs_and_gradients(eager.attention, tensors, **settings)
    monkeypatch.setattr(cpu_attention, "SCORES_BYTES", heads * 64 * 200 * 4)
    for mine, theirs in zip(outputs_and_gradients(OPS.attention, tensors, **settings), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


@pytest.fixture
def exact_products():
    """torch's setting for fp32 products: its default, and back to what it was."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "ieee"
    yield setting
    setting.fp32_precision = before


def test_the_scores_of_bf16_are_fp32(exact_products):
    # Two keys compete for the last query, with scores of 256 and 257: in bf16 the second is 256, too.
    q, k, v = (torch.zeros(1, 1, 100, 8, dtype=torch.bfloat16) for _ in range(3))
    q[..., :2] = torch.tensor([16.0, 1.0])
    k[..., :2] = torch.tensor([-16.0, 0.0])
    k[..., 3, :2] = torch.tensor([16.0, 0.0])
    k[..., 7, :2] = torch.tensor([16.0, 1.0])
    v[..., 7, :] = 1.0
    out = OPS.attention(q, k, v, segment_ids=None, slopes=None, scale=1.0)
    assert exact_products.fp32_precision == "ieee"
    expected = torch.tensor([0.0, 1.0]).softmax(0)[1]
    torch.testing.assert_close(out[0, 0, -1, 0].float(), expected, rtol=4e-3, atol=0)


@pytest.mark.parametrize(
    ("dtype", "tiles", "length", "faster"),
    [
        (torch.float32, False, 64, True),
        (torch.bfloat16, False, 4096, False),
        (torch.bfloat16, True, 128, False),
        (torch.bfloat16, True, 256, True),
    ],
)
def test_torchs_own_kernel_is_taken_where_it_is_the_faster_one(dtype, tiles, length, faster, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles})
    q = torch.zeros(1, 1, length, 8, dtype=dtype, requires_grad=True)
    out = OPS.attention(q, q, q, segment_ids=None, slopes=None, scale=1.0)
    assert ("FlashAttentionForCpu" in type(out.grad_fn).__name__) == faster


def test_keys_that_a_block_cannot_see_are_not_computed():
    ids = torch.arange(1, 9).repeat_interleave(128)[None]
    q = torch.empty(1, 1, 1024, 8)
    assert 128 % cpu_attention.query_block(1024) == 0
    for rows, keys, _, _ in cpu_attention._blocks(q, q, ids, None):
        assert (keys.start, keys.stop) == (rows.start // 128 * 128, rows.stop)


def test_the_bias_is_fp32_for_bf16_scores():
    # Two keys compete for the last query: itself, and one 257 back whose score of 256 nearly makes up for
    # its bias of -257. In bf16 -257 is -256, and the two would draw.
    q, k, v = (torch.zeros(1, 1, 600, 8, dtype=torch.bfloat16) for _ in range(3))
    q[..., 0] = 16.0
    k[..., :-1, 0] = -512.0
    k[..., -1 - 257, 0] = 16.0
    v[..., -1 - 257, :] = 1.0
    out = OPS.attention(q, k, v, segment_ids=None, slopes=torch.tensor([1.0]), scale=1.0)
    expected = torch.tensor([0.0, -1.0]).softmax(0)[1]
    torch.testing.assert_close(out[0, 0, -1, 0].float(), expected, rtol=4e-3, atol=0)


def test_rms_norm():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 16), torch.randn(16)
    expected = torch.nn.functional.rms_norm(x, (16,), weight, eps=1e-2)
    torch.testing.assert_close(OPS.rms_norm(x, weight, 1e-2), expected)


def test_rms_norm_of_bf16_rounds_once():
    torch.manual_seed(0)
    x = torch.randn(64, 32).to(torch.bfloat16)
    exact = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    out = OPS.rms_norm(x, torch.ones(32, dtype=torch.bfloat16), 1e-6)
    assert_rounded_once(out, exact)


def test_swiglu():
    gate, up = torch.randn(2, 8), torch.randn(2, 8)
    torch.testing.assert_close(OPS.swiglu(gate, up), gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_turns_each_pair_of_halves_by_its_angle(dtype):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 30, 8).to(dtype)
    cos, sin = rope_tables(torch.arange(30)[None], 8, 10000.0)
    out = OPS.rotary(x, cos[:, None], sin[:, None])
    assert out.dtype == dtype
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    angles = torch.arange(30).double()[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    else:
        assert_rounded_once(out, exact)


def assert_rounded_once(out, exact):
    """bf16 has 8 significant bits: rounding an exact value errs by at most 2^-8 of it."""
    assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


def test_unknown_backends_are_refused_with_the_known_ones():
    for ask in (get_backend, count_devices):
        with pytest.raises(ValueError, match=r"abacus.*known: cpu"):
            ask("abacus")


def test_the_cpu_backend_answers():
    backend = get_backend("cpu")
    assert (backend.name, backend.collectives, backend.count()) == ("cpu", "gloo", None)
    assert backend.device(3) == torch.device("cpu")
    assert 50 * 2**20 < backend.peak_memory_bytes() < 2**40
    backend.synchronize()


def test_ranks_of_a_host_share_its_cores():
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        for num_ranks, expected in ((1, cores), (cores, 1), (10 * cores, 1)):
            get_backend("cpu").setup(0, num_ranks)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_devices_are_counted_without_torch():
    code = "import sys; from bc2exp.hardware import *; print(count_devices('cpu'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "False"]
