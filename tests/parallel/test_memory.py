"""Bytes of what lasts and of gradients at their peak, per rank; and the types of all of it in bf16."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor

from bc2exp.model.plan import tensor_cut
from bc2exp.parallel.shard import local
from bc2exp.tasks import build
from bc2exp.train import state
from bc2exp.train.checkpoint import Progress
from bc2exp.weights import hf_layout, load_hf_into, save_hf
from tests.parallel.problem import (
    CASES,
    SHAPES,
    VOCABULARY,
    Case,
    adamw,
    batches_of,
    laid_out,
    model_of,
    trainer_of,
)
from tests.train.parts import ONE_RANK, make_checkpoints, save


def nbytes(tensors):
    """Of the memory behind tensors, padding of shards included; what several are views of counts once."""
    storages = {local(tensor).untyped_storage() for tensor in tensors}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held(world, kind, case, precision="fp32"):
    """Bytes of parameters, gradients before the step and moments after it, and all their types."""
    layout = laid_out(world, kind, case, precision)
    optimizer = adamw(layout)
    parameters = list(layout.model.parameters())
    found = {}

    def count(*_):
        gradients = [parameter.grad for parameter in parameters]
        found["gradients"] = nbytes(gradients)
        found["types"] = {gradient.dtype for gradient in gradients}

    optimizer.register_step_pre_hook(count)
    computed = set()
    for layer in layout.model.layers.values():
        layer.register_forward_hook(lambda module, given, result: computed.add(result.dtype))
    trainer_of(layout, optimizer, steps=1, evaluation=[], eval_every=None).run(0)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    found["parameters"] = nbytes(parameters)
    found["moments"] = nbytes(moments)
    found["types"] |= {tensor.dtype for tensor in (*parameters, *moments)}
    return found, computed


def total(kind):
    return 4 * sum(parameter.numel() for parameter in model_of(kind).parameters())


@pytest.mark.parametrize("name", ["zero2 2", "zero3 2", "zero3 4", "hsdp4", "tp2", "tp4", "tp2 x zero3 2"])
def test_what_lasts_is_divided_by_the_degree(ranks, name):
    degrees = CASES[name].degrees
    share = degrees.get("shard", 1) * degrees.get("tensor", 1)
    model = model_of("13b")
    norms = 4 * sum(value.numel() for key, value in model.named_parameters() if tensor_cut(key).dim is None)
    for found, _ in ranks(CASES[name].size, held, "13b", CASES[name]):
        # the norms are whole on tensor-parallel ranks
        expected = total("13b") / share + norms * (1 / degrees.get("shard", 1) - 1 / share)
        for part, factor in (("parameters", 1), ("gradients", 1), ("moments", 2)):
            assert found[part] == pytest.approx(factor * expected, rel=0.01), part


def test_copies_hold_everything(ranks):
    for found, _ in ranks(2, held, "7b", CASES["ddp2"]):
        assert (found["parameters"], found["moments"]) == (total("7b"), 2 * total("7b"))


def gathered(world, case):
    """Bytes of gathered parameters after the forward passes and the backward passes of two micro batches."""
    layout = laid_out(world, "13b", case)
    first, last = batches_of(0, layout.mesh)[:2]
    seen = []

    def count():
        # a sharded parameter is a distributed tensor, a gathered one is plain
        seen.append(nbytes(p for p in layout.model.parameters() if not isinstance(p, DTensor)))

    forward = type(layout)._forward

    def counting(*arguments):
        if seen:
            count()  # behind the backward pass before
        result = forward(*arguments)
        count()
        return result

    type(layout)._forward = counting
    try:
        layout.train([first, last], 1.0)
    finally:
        type(layout)._forward = forward
    count()
    return seen


def test_zero2_keeps_parameters_through_a_step_and_zero3_a_layer_at_a_time(ranks):
    width = SHAPES["13b"]["hidden_size"]
    head = 4 * width * (VOCABULARY + 1 + 1)  # a row of padding, as two shares are of one size; the last norm
    whole = total("13b") + 4 * width * 2
    # after the first forward, after its backward, after the second forward, after the step
    for seen in ranks(2, gathered, CASES["zero2 2"]):
        assert seen == [whole, whole, whole, 0]
    for seen in ranks(2, gathered, CASES["zero3 2"]):
        assert seen == [head, 0, head, 0]


@pytest.mark.parametrize("case", [Case({"tensor": 2}, {"sequence_parallel": True}), CASES["zero3 2"], Case()])
def test_bf16_is_for_computing_alone(ranks, case):
    for found, computed in ranks(case.size, held, "7b", case, "bf16"):
        assert found["types"] == {torch.float32}
        assert computed == {torch.bfloat16}


@pytest.mark.slow
def test_bf16_is_for_computing_alone_on_eight_tensor_parallel_ranks(ranks):
    for found, computed in ranks(8, held, "13b", CASES["tp8"], "bf16"):
        assert found["types"] == {torch.float32}
        assert computed == {torch.bfloat16}


def alive_at_most(counted):
    """A wrapper that notes, at each call, how many results of earlier calls are still alive."""
    alive, most = [], [0]

    def calling(*arguments, **named):
        most[0] = max(most[0], sum(reference() is not None for reference in alive))
        result = counted(*arguments, **named)
        tensors = result.values() if isinstance(result, dict) else [result]
        alive.extend(weakref.ref(tensor) for tensor in tensors)
        return result

    return calling, most


@pytest.mark.parametrize("source", ["fresh", "folder", "checkpoint"])
def test_a_rank_is_filled_one_whole_tensor_at_a_time(tmp_path, monkeypatch, source):
    layout = laid_out(ONE_RANK, "7b", Case())
    optimizer = adamw(layout)
    checkpoints, _ = make_checkpoints(tmp_path)
    if source == "fresh":
        calling, most = alive_at_most(build.initial_tensor)
        monkeypatch.setattr(build, "initial_tensor", calling)
        build.fill(layout, SimpleNamespace(weights=None), seed=0, init_std=0.1)
    elif source == "checkpoint":
        trainer_of(layout, optimizer, steps=1, evaluation=[], eval_every=None).run(0)
        save(checkpoints, layout, optimizer, Progress(1, 8))
        calling, most = alive_at_most(state.load_file)
        monkeypatch.setattr(state, "load_file", calling)
        assert checkpoints.load_newest(layout, optimizer) == Progress(1, 8)
    else:
        tensors = {name: torch.zeros(shape) for name, shape in layout.parts.shapes.items()}
        save_hf(tensors, tmp_path / "weights", config=layout.model.shape, dtype=torch.float32)
        seen, name_of = [], hf_layout.published_name

        def asked_before_each_read(name):
            assert not any(reference() is not None for reference in seen), name
            return name_of(name)

        def assign(name, _, whole):
            seen.append(weakref.ref(whole))
            layout.assign(name, whole)

        monkeypatch.setattr(hf_layout, "published_name", asked_before_each_read)
        load_hf_into(layout.model, tmp_path / "weights", assign=assign)
        most = [0]
        assert len(seen) == len(tensors)
    assert most == [0]
