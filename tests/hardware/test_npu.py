"""The NPU's operations against their eager twins on the CPU, values and gradients, in a rehearsal."""

# ruff: noqa: E402  (the devices come before torch)
from __future__ import annotations

from tests.hardware import npu_device

npu_device.require()

from collections import Counter
from functools import partial

import pytest
import torch
import torch_npu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bc2exp.hardware import eager, get_backend, npu_attention
from bc2exp.model.positions import alibi_slopes, rope_tables
from tests.hardware.test_ops import packed

BACKEND = get_backend("npu")
OPS = BACKEND.ops
NPU = torch.device("npu", 0)
TYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Fused(TorchDispatchMode):
    """Counts the device's own operators, but for those of backward passes."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "npu" and not ("grad" in name or "backward" in name):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def called():
    """called(): the device's own operators that ran in the test, and how often."""
    with Fused() as mode:
        yield lambda: dict(mode.counts)


def results(function, device, dtype, tensors):
    """Output and gradients, fp32 on the CPU; the gradient that comes in differs from place to place."""
    leaves = [tensor.detach().to(device, dtype).requires_grad_() for tensor in tensors]
    out = function(*leaves)
    assert out.dtype == dtype
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(out, leaves, direction.to(device))
    return [tensor.detach().float().cpu() for tensor in (out, *gradients)]


def compare(ours, twin, dtype, *tensors):
    """`ours` on the NPU in `dtype` against `twin` on the CPU in fp32, from the same numbers."""
    rounded = [tensor.to(dtype).float() for tensor in tensors]
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    found = results(ours, NPU, dtype, rounded)
    for mine, theirs in zip(found, results(twin, "cpu", torch.float32, rounded), strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * scale)


def compare_attention(dtype, heads, dim, length, *, segments=False, slopes=None, batch=2, scale=0.3):
    """Attention on the NPU against its twin; `segments`: False, True, or the ids."""
    tensors = [torch.randn(batch, heads, length, dim) for _ in range(3)]
    ids = packed(batch, length) if segments is True else segments if segments is not False else None
    given = {"segment_ids": ids, "slopes": slopes, "scale": scale}
    there = {key: value.to(NPU) if torch.is_tensor(value) else value for key, value in given.items()}
    compare(partial(OPS.attention, **there), partial(eager.attention, **given), dtype, *tensors)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize(("heads", "dim", "length"), [(4, 128, 40), (5, 128, 40), (3, 16, 300), (2, 8, 2)])
def test_attention_equals_its_twin(dtype, segments, alibi, heads, dim, length, called):
    slopes = alibi_slopes(heads) if alibi else None
    compare_attention(dtype, heads, dim, length, segments=segments, slopes=slopes, batch=3)
    # nothing but this operator ran; backward is not counted
    assert called() == {f"npu_fusion_attention{'_v2' if alibi else ''}": 1}


@pytest.mark.parametrize("segments", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("rank", range(8))
def test_each_rank_of_tp_8_has_the_slopes_of_its_heads(segments, rank):
    mine = alibi_slopes(40)[rank * 5 : rank * 5 + 5]
    compare_attention(torch.float32, 5, 128, 33, segments=segments, slopes=mine)


def test_all_40_heads_of_the_13b_and_all_32_of_the_7b():
    compare_attention(torch.float32, 40, 128, 30, segments=True, slopes=alibi_slopes(40), scale=128**-0.5)
    compare_attention(torch.float32, 32, 128, 30, segments=True, scale=128**-0.5)


def test_more_positions_than_the_causal_mask_has_rows():
    compare_attention(torch.float32, 1, 8, 2100, batch=1, slopes=torch.tensor([0.01]))


def test_segments_of_every_length_next_to_each_other():
    ids = torch.tensor([[1, 2, 2, 3, 3, 3, 9, 8, 8, 8, 8, 8, 0], [5] * 12 + [6], [0] * 13])
    assert npu_attention.segment_ends(ids) == [1, 3, 6, 7, 12, 13, 25, 26, 39]
    for slopes in (None, alibi_slopes(4)):
        compare_attention(torch.float32, 4, 16, 13, segments=ids, slopes=slopes, batch=3)


def test_recomputed_attention_and_its_ends_are_the_same(called):
    ids = packed(2, 50).to(NPU)
    tensors = [torch.randn(2, 4, 50, 16) for _ in range(3)]
    ours = partial(OPS.attention, segment_ids=ids, slopes=alibi_slopes(4, NPU), scale=0.3)
    again = partial(checkpoint, ours, use_reentrant=False, preserve_rng_state=False)
    for once, twice in zip(
        results(ours, NPU, torch.bfloat16, tensors), results(again, NPU, torch.bfloat16, tensors), strict=True
    ):
        assert torch.equal(once, twice)
    assert called() == {"npu_fusion_attention_v2": 3}


def test_ends_are_read_from_the_device_once_a_pass(monkeypatch):
    reads = []
    read = npu_attention._read_ends
    monkeypatch.setattr(npu_attention, "_read_ends", lambda rows: reads.append(1) or read(rows))
    q = torch.randn(2, 4, 50, 16, device=NPU)
    first, second = packed(2, 50).to(NPU), packed(2, 50).to(NPU)
    for ids in (first, second, first, first):
        OPS.attention(q, q, q, segment_ids=ids, slopes=None, scale=0.3)
    assert len(reads) == 2
    first[0, 3:] += 10  # the same tensor with other ids
    changed = OPS.attention(q, q, q, segment_ids=first, slopes=None, scale=0.3)
    assert len(reads) == 3
    expected = eager.attention(*[q.cpu()] * 3, segment_ids=first.cpu(), slopes=None, scale=0.3)
    torch.testing.assert_close(changed.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_the_mask_is_made_once_and_fit_for_training_after_inference():
    npu_attention._masks.clear()
    with torch.inference_mode():
        first = npu_attention.causal_mask(NPU)
    assert npu_attention.causal_mask(NPU) is first
    compare_attention(torch.float32, 2, 8, 10)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("num_queries", [1, 3, 30])
def test_cached_keys_are_left_to_the_twin(alibi, segments, num_queries, called):
    q, k, v = (torch.randn(3, 5, 40, 8) for _ in range(3))
    ids, slopes = packed(3, 40) if segments else None, alibi_slopes(5) if alibi else None
    whole = eager.attention(q, k, v, segment_ids=ids, slopes=slopes, scale=0.3)
    there = {"segment_ids": ids, "slopes": slopes}
    there = {key: None if value is None else value.to(NPU) for key, value in there.items()}
    last = OPS.attention(q[:, :, -num_queries:].to(NPU), k.to(NPU), v.to(NPU), **there, scale=0.3)
    torch.testing.assert_close(last.cpu(), whole[:, :, -num_queries:], rtol=1e-5, atol=1e-5)
    assert called() == {}


def test_what_the_operator_does_not_take_is_left_to_the_twin(called, monkeypatch):
    back = torch.tensor([[1, 1, 2, 2, 1, 1]])  # segment 1 comes back
    compare_attention(torch.float32, 2, 8, 6, segments=back, batch=1)
    compare_attention(torch.float32, 1, 770, 4)
    compare_attention(torch.float32, 257, 2, 4, batch=1)
    monkeypatch.setattr(npu_attention, "MOST_SEGMENTS", 3)
    compare_attention(torch.float32, 2, 8, 4, segments=torch.tensor([[1, 2, 3, 4]]), batch=1)
    assert called() == {}
    compare_attention(torch.float32, 2, 8, 3, segments=torch.tensor([[1, 2, 3]]), batch=1)
    assert called() == {"npu_fusion_attention": 1}


def mistaken(monkeypatch, **changes):
    """Let every call of the attention operators pass through `changes`, {argument: function of it}."""
    for name in ("npu_fusion_attention", "npu_fusion_attention_v2"):
        operator = getattr(torch_npu, name)

        def wrapped(*args, operator=operator, **given):
            given = {key: changes.get(key, lambda value: value)(value) for key, value in given.items()}
            return operator(*args, **given)

        monkeypatch.setattr(npu_attention.torch_npu, name, wrapped)


MISTAKES = {
    "mask polarity": {
        "atten_mask": lambda mask: ~torch.ones(40, 40, dtype=torch.bool, device=NPU).triu(1),
        "sparse_mode": lambda mode: 1,
    },
    "lost causality": {"atten_mask": lambda mask: None},
    "scale left out": {"scale": lambda scale: 1.0},
    "bias before the scale": {
        "pse": lambda slopes: eager.alibi_bias(slopes, 40, 40)[None],
        "pse_type": lambda kind: 1,
    },
    "slopes under a root": {"pse_type": lambda kind: 3},
    "slopes of other heads": {"pse": lambda slopes: slopes.flip(0).contiguous()},
    "segments that run on": {
        "actual_seq_qlen": lambda ends: ends[-1:],
        "actual_seq_kvlen": lambda ends: ends[-1:],
    },
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_call_is_seen(mistake, monkeypatch):
    packed_only = mistake == "segments that run on"
    given = {
        "segments": packed_only,
        "slopes": None if "causality" in mistake or packed_only else alibi_slopes(4),
    }
    compare_attention(torch.float32, 4, 16, 40, **given)
    mistaken(monkeypatch, **MISTAKES[mistake])
    with pytest.raises(AssertionError, match="not close"):
        compare_attention(torch.float32, 4, 16, 40, **given)


def test_the_operator_refuses_a_turned_compressed_mask(monkeypatch):
    mistaken(monkeypatch, atten_mask=lambda mask: ~mask)
    with pytest.raises(ValueError, match="True = masked out"):
        compare_attention(torch.float32, 4, 16, 40)


@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm_equals_its_twin(dtype, called):
    x, weight = torch.randn(2, 7, 64), 1 + torch.randn(64) / 4
    compare(partial(OPS.rms_norm, eps=1e-2), partial(eager.rms_norm, eps=1e-2), dtype, x, weight)
    assert called()["npu_rms_norm"] == 1


@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu_equals_its_twin(dtype, called):
    compare(OPS.swiglu, eager.swiglu, dtype, torch.randn(2, 5, 24), torch.randn(2, 5, 24))
    assert called()["npu_swiglu"] == 1


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("batch", [1, 3], ids=["one table", "a table a row"])
def test_rotary_equals_its_twin(dtype, batch, called):
    positions = torch.randint(0, 4096, (batch, 30))
    tables = [table[:, None] for table in rope_tables(positions, 16, 10000.0)]
    there = [table.to(NPU) for table in tables]
    # as the model has it: [B, S, N, D] seen as [B, N, S, D]
    x = torch.randn(3, 30, 4, 16).transpose(1, 2)
    compare(lambda x: OPS.rotary(x, *there), lambda x: eager.rotary(x, *tables), dtype, x)
    assert called() == {"npu_rotary_mul": 2}  # backward turns the other way


def test_rotary_of_bf16_rounds_once():
    x = torch.randn(2, 4, 300, 16).to(torch.bfloat16)
    cos, sin = (table[:, None] for table in rope_tables(torch.arange(3000, 3300)[None], 16, 10000.0))
    exact = eager.rotary(x.double().float(), cos, sin)
    found = OPS.rotary(x.to(NPU), cos.to(NPU), sin.to(NPU)).float().cpu()
    assert ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


def test_rotary_keeps_its_tables_alone():
    kept = []
    cos, sin = (table[:, None].to(NPU) for table in rope_tables(torch.arange(9)[None], 16, 10000.0))
    x = torch.randn(1, 4, 9, 16, device=NPU, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        OPS.rotary(x, cos, sin)
    assert {tensor.data_ptr() for tensor in kept} == {cos.data_ptr(), sin.data_ptr()}


def test_a_head_that_rotary_does_not_take_is_left_to_the_twin(called):
    cos, sin = (table[:, None] for table in rope_tables(torch.arange(3)[None], 900, 10000.0))
    x = torch.randn(1, 1, 3, 900)
    there = OPS.rotary(*(tensor.to(NPU) for tensor in (x, cos, sin)))
    torch.testing.assert_close(there.cpu(), eager.rotary(x, cos, sin), rtol=1e-5, atol=1e-5)
    assert called() == {}


@pytest.mark.parametrize("name", ["attention", "rms_norm", "swiglu", "rotary"])
def test_each_operator_can_be_left_to_its_twin(name):
    chosen = eager.with_twins(OPS, [name])
    assert getattr(chosen, name) is getattr(eager.OPS, name)
    others = {"attention", "rms_norm", "swiglu", "rotary"} - {name}
    assert all(getattr(chosen, other) is getattr(OPS, other) for other in others)


def test_the_backend_answers():
    assert (BACKEND.name, BACKEND.collectives, BACKEND.packages) == ("npu", "hccl", ("torch_npu",))
    assert BACKEND.device(3) == torch.device("npu", 3)
    BACKEND.setup(0, 8)
    assert not torch.npu.matmul.allow_hf32
    assert not torch.npu.conv.allow_hf32
    held = torch.zeros(2**24, dtype=torch.uint8, device=BACKEND.device(0))
    BACKEND.synchronize()
    assert held.nbytes <= BACKEND.peak_allocated_bytes() <= BACKEND.peak_memory_bytes() < 2**32
    assert BACKEND.total_memory_bytes() == 64 * 2**30


def test_more_ranks_than_devices_is_one_sentence():
    with pytest.raises(ValueError, match=r"hardware\.backend=npu: torch_npu sees 8 NPUs and 9 are asked for"):
        BACKEND.setup(0, 9)


def test_two_allocator_variables_end_a_rank_by_name(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(ValueError, match="PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF are set together"):
        BACKEND.setup(0, 1)
