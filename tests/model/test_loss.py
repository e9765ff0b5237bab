"""The chunked NormHead loss against the plain one, whole and in vocabulary shards."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from bc2exp.hardware import eager
from bc2exp.model import loss as loss_module
from bc2exp.model.loss import norm_head_loss_sum
from bc2exp.model.room import Room

VOCAB, HIDDEN, TOKENS = 211, 24, 37
OPS = replace(eager.OPS, head_block_words=50)  # the last block is narrower
loss_sum = partial(norm_head_loss_sum, ops=OPS)
LABELLED = 28


def problem(dtype=torch.float32):
    """hidden [T, H], weight [V, H], labels [T] with some -100, real [T] with some padding."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) * 0.1).to(dtype)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[torch.randperm(TOKENS, generator=generator)[LABELLED:]] = -100
    real = torch.ones(TOKENS, dtype=torch.bool)
    real[(labels == -100).nonzero()[:4, 0]] = False
    return hidden.requires_grad_(), weight.requires_grad_(), labels, real


def plain(hidden, weight, labels, real=None, z_loss_weight=0.0, z_loss_ratio=None):
    """The same loss with all logits at once."""
    logits = hidden.float() @ F.normalize(weight.float()).T
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    if z_loss_weight:
        largest = logits.max(dim=1).values[slice(None) if real is None else real]
        ratio = (labels != -100).sum() / len(largest) if z_loss_ratio is None else z_loss_ratio
        loss = loss + z_loss_weight * ratio * largest.square().sum()
    return loss


def gradients(loss, hidden, weight, factor=1.0):
    return torch.autograd.grad(loss * factor, (hidden, weight))


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5, 28, 1000])
@pytest.mark.parametrize("factor", [1.0, -0.37])
def test_equals_the_plain_loss_at_every_chunk_size_and_scale(chunk_tokens, factor):
    hidden, weight, labels, _ = problem()
    expected = plain(hidden, weight, labels)
    ours = loss_sum(hidden, weight, labels, chunk_tokens=chunk_tokens)
    assert ours.shape == (1,)
    torch.testing.assert_close(ours[0], expected, rtol=1e-6, atol=0)
    theirs = gradients(expected, hidden, weight, factor)
    for mine, their in zip(gradients(ours, hidden, weight, factor), theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_words", [1, 7, VOCAB - 1, VOCAB, 1000])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
def test_equals_the_plain_loss_with_every_size_of_block(block_words, z_loss_weight):
    hidden, weight, labels, _ = problem()
    expected = plain(hidden, weight, labels, z_loss_weight=z_loss_weight)
    ops = replace(OPS, head_block_words=block_words)
    ours = loss_sum(hidden, weight, labels, chunk_tokens=8, z_loss_weight=z_loss_weight, ops=ops)
    torch.testing.assert_close(ours[0], expected, rtol=1e-6, atol=0)
    for mine, their in zip(gradients(ours, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [59.0, 61.0, 1000.0])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.01])
def test_hidden_states_of_any_length(length, z_loss_weight):
    """The exponential of 1,000 is no number in fp32, and that of -1,000 is nought."""
    hidden, weight, labels, _ = problem()
    with torch.no_grad():
        hidden *= length / torch.linalg.vector_norm(hidden, dim=1, keepdim=True)
        hidden[3] = length * F.normalize(weight[7], dim=0)  # this one's largest logit is its length
        hidden[4] = -hidden[3]
        labels[3:5] = 7
    expected = plain(hidden, weight, labels, z_loss_weight=z_loss_weight)
    ours = loss_sum(hidden, weight, labels, chunk_tokens=8, z_loss_weight=z_loss_weight)
    torch.testing.assert_close(ours[0], expected, rtol=1e-6, atol=0)
    for mine, their in zip(gradients(ours, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-5 * length)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value):
    hidden, weight, labels, _ = problem()
    with torch.no_grad():
        hidden[int((labels != -100).nonzero()[0])] = value
    assert not loss_sum(hidden, weight, labels).isfinite()


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("ratio", [None, 0.7])
def test_z_loss_counts_every_real_position(padding, ratio):
    hidden, weight, labels, real = problem()
    settings = {"real": real if padding else None, "z_loss_weight": 0.3, "z_loss_ratio": ratio}
    expected = plain(hidden, weight, labels, **settings)
    ours = loss_sum(hidden, weight, labels, chunk_tokens=8, **settings)
    torch.testing.assert_close(ours[0], expected, rtol=1e-6, atol=0)
    for mine, their in zip(gradients(ours, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-5)


def test_bf16_is_the_fp32_value_within_rounding():
    hidden, weight, labels, _ = problem(torch.bfloat16)
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    expected = plain(*wide, labels)
    ours = loss_sum(hidden, weight, labels, chunk_tokens=8)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours[0], expected, rtol=2**-8, atol=0)
    for mine, their in zip(gradients(ours, hidden, weight), gradients(expected, *wide), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - their).norm() <= 2**-7 * their.norm()


@pytest.mark.parametrize("labelled", [HIDDEN - 3, HIDDEN, LABELLED], ids=["fewer", "as many", "more"])
def test_a_narrow_gradient_is_the_wide_one_rounded(labelled):
    """It lies over the logits, or beside where there are more positions than columns."""
    hidden, weight, labels, _ = problem(torch.bfloat16)
    labels[(labels != -100).nonzero()[labelled:, 0]] = -100
    assert (labels != -100).sum() == labelled
    found, room = [], Room()
    for narrow_gradient in (None, room):
        leaves = hidden.detach().requires_grad_(), weight.detach().float().requires_grad_()
        leaves[1].grad_dtype = None
        loss = loss_sum(leaves[0], leaves[1], labels, narrow_gradient=narrow_gradient)
        (0.3 * loss).sum().backward()
        found.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    (loss, of_hidden, wide), (same_loss, same, narrow) = found
    assert torch.equal(loss, same_loss)
    assert torch.equal(of_hidden, same)
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(narrow, wide.bfloat16())
    assert narrow.data_ptr() == room.memory.data_ptr()


def test_gradients_that_are_added_up_stay_wide():
    hidden, weight, labels, _ = problem(torch.bfloat16)
    wide = weight.detach().float().requires_grad_()
    wide.grad_dtype = None
    loss_sum(hidden, wide, labels, chunk_tokens=8, narrow_gradient=Room()).backward()
    assert wide.grad.dtype == torch.float32


def test_what_is_left_of_a_word_that_is_all_but_certain_is_no_rounding_error():
    """Its probability less one is far below the step of bf16 at one."""
    hidden, weight, labels, _ = problem(torch.bfloat16)
    with torch.no_grad():
        labels[3] = 7
        hidden[3] = 20 * F.normalize(weight[7], dim=0)
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    expected = gradients(plain(*wide, labels), *wide)[0][3]
    ours = gradients(loss_sum(hidden, weight, labels), hidden, weight)[0][3]
    assert expected.norm() < 2**-8
    assert (ours.float() - expected).norm() <= 0.1 * expected.norm()


def test_no_work_for_gradients_that_nobody_wants():
    hidden, weight, labels, _ = problem()
    expected = plain(hidden, weight, labels)
    with torch.no_grad():
        loss = loss_sum(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss[0], expected, rtol=1e-6, atol=0)
    frozen = loss_sum(hidden, weight.detach(), labels)
    assert frozen.grad_fn.gradients[1] is None
    (mine,) = torch.autograd.grad(frozen, hidden)
    torch.testing.assert_close(mine, gradients(expected, hidden, weight)[0], rtol=1e-5, atol=1e-5)


def test_rows_without_a_label_never_reach_the_head():
    hidden, weight, labels, _ = problem()
    poisoned = hidden.detach().masked_fill((labels == -100)[:, None], float("nan")).requires_grad_()
    loss = loss_sum(poisoned, weight, labels)
    torch.testing.assert_close(loss, loss_sum(hidden, weight, labels))
    grad_hidden, grad_weight = gradients(loss, poisoned, weight)
    assert grad_hidden[labels == -100].eq(0).all()
    assert grad_weight.isfinite().all()


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
def test_without_a_single_label_loss_and_gradients_are_zero(z_loss_weight):
    hidden, weight, labels, _ = problem()
    loss = loss_sum(hidden, weight, torch.full_like(labels, -100), z_loss_weight=z_loss_weight)
    assert loss.tolist() == [0.0]
    assert all(gradient.eq(0).all() for gradient in gradients(loss, hidden, weight))


@pytest.mark.parametrize("wrong", [VOCAB, -1, -99, 10**6])
def test_a_label_outside_the_vocabulary_is_named(wrong):
    hidden, weight, labels, _ = problem()
    labels[3] = wrong
    with pytest.raises(ValueError, match=rf"label {wrong} .*{VOCAB}"):
        loss_sum(hidden, weight, labels)


def test_a_second_backward_is_refused():
    hidden, weight, labels, _ = problem()
    loss = loss_sum(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_a_row_of_zeros_divides_nothing_by_zero():
    hidden, weight, labels, _ = problem()
    with torch.no_grad():
        weight[5] = 0.0
    ours = loss_sum(hidden, weight, labels)
    expected = plain(hidden, weight, labels)
    torch.testing.assert_close(ours[0], expected, rtol=1e-6, atol=0)
    for mine, their in zip(gradients(ours, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-5)


SHARD_CASES = [(0.0, 1.0), (0.3, 1.0), (0.0, 40.0)]
"""Weight of the z-loss, and a factor of the hidden states; they are about 5 long."""


def shard_problem(case):
    z_loss_weight, factor = case
    hidden, weight, labels, real = problem()
    # A copy of a row in the other shard: the largest logit may then be in both.
    weight = torch.cat((weight[:100], weight[:11], weight[111:])).detach().requires_grad_()
    hidden = (factor * hidden.detach()).requires_grad_()
    return z_loss_weight, hidden, weight, labels, real


def _run_shard(rank: int, folder: str) -> None:
    """One rank of two: the loss and gradients of its shard, 100 and 111 words, written to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for case in SHARD_CASES:
        z_loss_weight, hidden, weight, labels, real = shard_problem(case)
        start, stop = ((0, 100), (100, VOCAB))[rank]
        shard = weight.detach()[start:stop].clone().requires_grad_()
        loss = loss_sum(
            hidden,
            shard,
            labels,
            real=real,
            z_loss_weight=z_loss_weight,
            chunk_tokens=9,
            vocab_start=start,
            vocab_size=VOCAB,
            group=dist.group.WORLD,
        )
        results[case] = (loss.detach(), *gradients(loss, hidden, shard))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_vocabulary_shards_equal_the_whole(tmp_path: Path):
    mp.start_processes(_run_shard, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case in SHARD_CASES:
        z_loss_weight, hidden, weight, labels, real = shard_problem(case)
        tolerances = {"rtol": 1e-5, "atol": 1e-5 * case[1] ** 2}  # logits and states are that much larger
        expected = plain(hidden, weight, labels, real, z_loss_weight)
        grad_hidden, grad_weight = gradients(expected, hidden, weight)
        (loss0, hidden0, weight0), (loss1, hidden1, weight1) = (rank[case] for rank in ranks)
        assert torch.equal(loss0, loss1)
        torch.testing.assert_close(loss0[0], expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(hidden0 + hidden1, grad_hidden, **tolerances)
        torch.testing.assert_close(torch.cat((weight0, weight1)), grad_weight, **tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 1000, 1024, 4096, 5000])
def test_chunks_are_few_of_about_one_size_and_within_their_part_of_the_gradient(dtype, num_rows):
    hidden = torch.empty(num_rows, 1024, dtype=dtype, device="meta")
    size = loss_module._chunk_tokens(num_rows, 125_696, hidden)
    chunks = -(-num_rows // size)
    assert size % loss_module.CHUNK_MULTIPLE == 0
    assert chunks * size - num_rows < chunks * loss_module.CHUNK_MULTIPLE
    # Per word of the vocabulary: what a chunk's logits take, and the part of the gradient that they may.
    limit = loss_module.PART_OF_GRADIENT * 4 * hidden.shape[1]
    assert size * hidden.element_size() <= limit
    if chunks > 1:
        assert num_rows / (chunks - 1) * hidden.element_size() > limit - 4 * loss_module.CHUNK_MULTIPLE
