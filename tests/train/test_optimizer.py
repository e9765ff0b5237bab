"""AdamW against its formula, and the learning rate against tables."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bc2exp.train import optimizer as optimizer_module
from bc2exp.train.optimizer import build_optimizer, lr_schedule, set_lr
from tests.small_run import small_config
from tests.train.parts import make_model


def schedule(kind="cosine", *, lr=1.0, min_lr=0.1, steps=10, warmup_steps=None, warmup_fraction=None):
    return lr_schedule(
        kind=kind,
        lr=lr,
        min_lr=min_lr,
        steps=steps,
        warmup_steps=warmup_steps,
        warmup_fraction=warmup_fraction,
    )


TABLES = {
    # 2 steps up, 8 down to the floor: cosine is at its middle (0.1 + 0.9 / 2) after 4 of the 8
    "cosine": {1: 0.5, 2: 1.0, 4: 0.868198, 6: 0.55, 8: 0.231802, 10: 0.1},
    "linear": {1: 0.5, 2: 1.0, 3: 0.8875, 4: 0.775, 6: 0.55, 9: 0.2125, 10: 0.1},
    "constant": {1: 0.5, 2: 1.0, 3: 1.0, 10: 1.0},
}


@pytest.mark.parametrize("warmup", [{"warmup_steps": 2}, {"warmup_fraction": 0.2}, {"warmup_fraction": 0.16}])
@pytest.mark.parametrize("kind", list(TABLES))
def test_the_schedule_follows_its_table(kind, warmup):
    lr_at = schedule(kind, **warmup)
    assert {step: lr_at(step) for step in TABLES[kind]} == pytest.approx(TABLES[kind], rel=1e-5)


def test_without_warmup_the_first_step_is_already_on_the_way_down():
    lr_at = schedule("linear", warmup_steps=0)
    assert [lr_at(1), lr_at(10)] == pytest.approx([0.91, 0.1])
    assert schedule("constant")(1) == 1.0


def test_a_schedule_of_warmup_alone_ends_at_the_top():
    assert [schedule(warmup_fraction=1.0)(step) for step in (1, 10)] == [0.1, 1.0]
    assert schedule(steps=1, warmup_fraction=0.1)(1) == pytest.approx(0.1)


def test_the_published_recipe_of_7b(tmp_path):
    task = small_config(tmp_path, "model=baichuan2_7b").task
    lr_at = lr_schedule(
        kind=task.schedule.kind.value,
        lr=task.optimizer.lr,
        min_lr=task.schedule.min_lr,
        steps=task.steps,
        warmup_steps=task.schedule.warmup_steps,
        warmup_fraction=task.schedule.warmup_fraction,
    )
    assert task.steps == 1000
    # the numbers of the published log: step 7, the end of the warmup, half way down, the last
    known = {7: 7e-8, 100: 1e-6, 550: 5.05e-7, 1000: 1e-8}
    assert {step: lr_at(step) for step in known} == pytest.approx(known, rel=1e-9)


def test_fused_adamw_takes_the_step_of_the_formula():
    lr, beta1, beta2, eps, decay = 0.01, 0.9, 0.95, 1e-8, 0.1
    torch.manual_seed(0)
    model = nn.ParameterDict({"matrix": torch.randn(5, 7), "vector": torch.randn(7)})
    optimizer = build_optimizer(model, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay)
    expected = {name: p.detach().double() for name, p in model.items()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 6):
        set_lr(optimizer, lr / step)
        for name, parameter in model.items():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient.clone()
            g = gradient.double()
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g * g
            if name == "matrix":
                expected[name] = expected[name] * (1 - lr / step * decay)
            corrected = second[name] / (1 - beta2**step)
            move = first[name] / (1 - beta1**step) / (corrected.sqrt() + eps)
            expected[name] = expected[name] - lr / step * move
        optimizer.step()
    for name, parameter in model.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_every_weight_decays_but_those_of_the_norms():
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, lr=0.5, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = {
        name
        for name, parameter in model.named_parameters()
        if torch.allclose(parameter, before[name] * 0.9) and not torch.equal(parameter, before[name])
    }
    norms = {name for name in before if "norm" in name}
    assert len(norms) == 5
    assert shrunk == set(before) - norms
    assert all(torch.equal(dict(model.named_parameters())[name], before[name]) for name in norms)
    assert math.prod(group["fused"] for group in optimizer.param_groups)


def narrow_problem() -> tuple[nn.ParameterDict, list[dict[str, torch.Tensor]]]:
    """Weights, and for some steps their gradients: bf16, sparse (a row twice, none), fp32."""
    torch.manual_seed(0)
    model = nn.ParameterDict(
        {"narrow": torch.randn(23, 7), "rows": torch.randn(31, 5), "vector": torch.randn(7)}
    )
    model["narrow"].grad_dtype = model["rows"].grad_dtype = None
    gradients = []
    for used in ([4, 30, 4, 0], [], [12]):
        rows = torch.sparse_coo_tensor(
            torch.tensor([used], dtype=torch.int64), torch.randn(len(used), 5), (31, 5), check_invariants=True
        )
        gradients.append({"narrow": torch.randn(23, 7).bfloat16(), "rows": rows, "vector": torch.randn(7)})
    return model, gradients


@pytest.mark.parametrize("block", [1, 10, 1000])
@pytest.mark.parametrize("fused", [True, False])
def test_narrow_gradients_take_the_step_of_wide_ones(block, fused, monkeypatch):
    monkeypatch.setattr(optimizer_module, "BLOCK", block)
    settings = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "fused": fused}
    (narrow, gradients), (wide, _) = narrow_problem(), narrow_problem()
    ours, plain = build_optimizer(narrow, **settings), build_optimizer(wide, **settings)
    for each in gradients:
        for name, gradient in each.items():
            narrow[name].grad = gradient.clone()
            wide[name].grad_dtype = torch.float32
            wide[name].grad = (gradient.to_dense() if gradient.is_sparse else gradient).float() * 0.25
        ours.step(factor=0.25)
        torch.optim.AdamW.step(plain)
    for name, parameter in narrow.items():
        torch.testing.assert_close(parameter, wide[name], rtol=1e-6, atol=1e-7)
        for kind, value in plain.state[wide[name]].items():
            torch.testing.assert_close(ours.state[parameter][kind], value, rtol=1e-6, atol=1e-9)


def test_a_factor_scales_wide_gradients():
    settings = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1.0, "weight_decay": 0.0}
    models = [nn.ParameterDict({"matrix": torch.ones(3, 2)}) for _ in range(2)]
    for model, gradient, factor in zip(models, (1.0, 4.0), (1.0, 0.25), strict=True):
        model["matrix"].grad = torch.full((3, 2), gradient)
        build_optimizer(model, **settings).step(factor=factor)
    assert torch.equal(models[0]["matrix"], models[1]["matrix"])
    assert not torch.equal(models[0]["matrix"], torch.ones(3, 2))
