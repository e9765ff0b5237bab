"""The model on NPUs: tiny ones against the CPU, and the true shapes on tensors without storage."""

# ruff: noqa: E402  (the devices come before torch)
from __future__ import annotations

from tests.hardware import npu_device

npu_device.require()

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bc2exp.hardware import eager, get_backend, npu_attention
from bc2exp.model import Baichuan2, init_weights
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.recompute import set_recompute
from bc2exp.parallel.tensor import cut_layers
from bc2exp.parallel.world import World
from bc2exp.plan.trace import _default_dtype, alone
from bc2exp.train.optimizer import build_optimizer
from tests.hardware.test_npu import Fused
from tests.hardware.test_ops import packed

BACKEND = get_backend("npu")
NPU = torch.device("npu", 0)

TINY = {
    "7b": {"hidden_size": 256, "intermediate_size": 688, "num_heads": 8, "position": "rope"},
    "13b": {"hidden_size": 384, "intermediate_size": 1024, "num_heads": 24, "position": "alibi"},
}
TRUE = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_heads": 32, "position": "rope"},
    "13b": {"hidden_size": 5120, "intermediate_size": 13696, "num_heads": 40, "position": "alibi"},
}


def tiny(kind, ops):
    model = Baichuan2(vocab_size=500, num_layers=2, z_loss_weight=1e-3, ops=ops, **TINY[kind])
    init_weights(model, seed=1, std=0.06)
    return model


def batch(segments):
    ids = torch.randint(1, 500, (2, 129), generator=torch.Generator().manual_seed(0))
    given, labels = ids[:, :-1].contiguous(), ids[:, 1:].clone()
    segment_ids = packed(2, 128) if segments else None
    if segments:
        labels[:, :-1][segment_ids[:, 1:] != segment_ids[:, :-1]] = -100
        labels[segment_ids == 0] = -100
    return given, segment_ids, labels


def loss_and_gradients(model, device, given, segment_ids, labels):
    segment_ids = None if segment_ids is None else segment_ids.to(device)
    loss = (
        model(given.to(device), segment_ids=segment_ids, labels=labels.to(device))
        / (labels != -100).sum().item()
    )
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", TINY)
def test_loss_and_gradients_are_those_of_the_cpu(kind, segments, recompute):
    here = tiny(kind, get_backend("cpu").ops)
    there = tiny(kind, BACKEND.ops).to(NPU)
    set_recompute(there, recompute)
    part = batch(segments)
    with Fused() as fused:
        loss, gradients = loss_and_gradients(there, NPU, *part)
    expected_loss, expected = loss_and_gradients(here, "cpu", *part)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        difference = (gradients[name] - gradient).norm() / gradient.norm()
        assert difference < 1e-5, name
    # the layers' operators run once more where they are recomputed; the last norm is in no layer
    layers, twice = 2, 2 if recompute == "full" else 1
    attention = "npu_fusion_attention" + ("_v2" if kind == "13b" else "")
    wanted = {
        attention: layers * twice,
        "npu_rms_norm": 2 * layers * twice + 1,
        "npu_swiglu": layers * (1 if recompute == "none" else 2),
    }
    if kind == "7b":
        wanted["npu_rotary_mul"] = 2 * layers * twice + 2 * layers  # q and k; backward turns them back
    assert dict(fused.counts) == wanted


@pytest.mark.parametrize("name", ["attention", "rms_norm", "swiglu", "rotary"])
def test_without_one_operator_the_loss_is_the_same(name):
    part = batch(True)
    losses = []
    for ops in (BACKEND.ops, eager.with_twins(BACKEND.ops, [name])):
        model = tiny("7b", ops).to(NPU)
        with Fused() as fused:
            losses.append(loss_and_gradients(model, NPU, *part)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    words = {"attention": "attention", "rms_norm": "rms_norm", "swiglu": "swiglu", "rotary": "rotary"}
    assert not [called for called in fused.counts if words[name] in called]


@pytest.fixture
def corrected_meta():
    """torch_npu 2.13 asks for `empty_like([0])` in the shapes of this gradient, and fails."""
    library = torch.library.Library("npu", "IMPL", "Meta")

    def gradient(query, key, value, dy, *args, **kwargs):
        empty = query.new_empty(0)
        return (*(torch.empty_like(part) for part in (query, key, value)), empty, empty, empty, None)

    library.impl("npu_fusion_attention_grad_v2", gradient, allow_override=True)
    yield
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("size", [1, 8], ids=["tp1", "tp8"])
@pytest.mark.parametrize("kind", TRUE)
def test_a_layer_of_the_true_model_without_storage(kind, size, segments, dtype, corrected_meta, monkeypatch):
    length, shape = 4096, TRUE[kind]
    # the ends of segments are values, which these tensors have not
    monkeypatch.setattr(npu_attention, "segment_ends", lambda ids: [1000, 4096, 4097, 8192])
    with alone(0, size):
        mesh = Mesh(World(0, size, 0, size, BACKEND), tensor=size)
        if size > 1:
            mesh.group("tensor")
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device(NPU), _default_dtype(dtype):
            model = Baichuan2(vocab_size=125696, num_layers=1, ops=BACKEND.ops, **shape)
            if size > 1:
                cut_layers(model, mesh, sequence_parallel=True)
            ids = torch.ones(2, length, dtype=torch.int64)
            context = model._context(length, NPU, ids if segments else None, None, None)
            hidden = torch.empty(2, length // size, shape["hidden_size"], dtype=dtype, requires_grad=True)
            layer = model.layers["0"]
            with Fused() as fused:
                out = layer(hidden, context)
                out.backward(torch.empty_like(out))
            assert out.shape == hidden.shape
            assert hidden.grad.shape == hidden.shape
            assert {tensor.dtype for tensor in (out, hidden.grad)} == {dtype}
            for name, parameter in layer.named_parameters():
                assert parameter.grad.shape == parameter.shape, name
                assert parameter.grad.device.type == "npu"
            inner = shape["intermediate_size"] // size
            assert layer.mlp.down_proj.weight.shape == (shape["hidden_size"], inner)
    attention = "npu_fusion_attention" + ("_v2" if kind == "13b" else "")
    turned = {"npu_rotary_mul": 4} if kind == "7b" else {}
    assert dict(fused.counts) == {attention: 1, "npu_rms_norm": 2, "npu_swiglu": 1, **turned}


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_that_of_the_cpu(fused):
    settings = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    here = tiny("7b", BACKEND.ops)
    there = copy.deepcopy(here).to(NPU)
    ours = build_optimizer(there, **settings, fused=fused)
    groups = [[p for p in here.parameters() if p.dim() > 1], [p for p in here.parameters() if p.dim() <= 1]]
    plain = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=3e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False,
    )  # fmt: skip
    for step in range(4):
        for number, (a, b) in enumerate(zip(here.parameters(), there.parameters(), strict=True)):
            gradient = torch.randn(a.shape, generator=torch.Generator().manual_seed(100 * step + number))
            a.grad, b.grad = gradient, gradient.to(NPU)
        ours.step()
        plain.step()
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(b.detach().cpu(), a.detach(), rtol=1e-5, atol=1e-6, msg=name)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[b][key].cpu(), plain.state[a][key], rtol=1e-5, atol=1e-7)


def test_deterministic_training_runs_and_repeats():
    before = torch.are_deterministic_algorithms_enabled()
    try:
        BACKEND.setup(0, 1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        part = batch(True)
        first, second = (loss_and_gradients(tiny("13b", BACKEND.ops).to(NPU), NPU, *part) for _ in range(2))
        assert first[0] == second[0]
        assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_mask_without_storage_is_not_kept_for_real_runs():
    npu_attention._masks.clear()
    with FakeTensorMode():
        npu_attention.causal_mask(NPU)
    assert not npu_attention._masks
    assert npu_attention.causal_mask(NPU).sum() == 2048 * 2047 // 2
