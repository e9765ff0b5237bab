import pytest
import torch

from bc2exp.data.batches import IGNORED, evaluation_batches, training_batches
from bc2exp.data.order import epoch_order, sample_at
from bc2exp.data.tokens import TokenStream

LENGTH = 5


def _stream(num_tokens: int) -> TokenStream:
    return TokenStream(torch.arange(num_tokens, dtype=torch.int32), torch.tensor([0]))


def test_every_token_but_the_first_is_a_label_once_an_epoch() -> None:
    stream = _stream(5 * 8 + 1)
    batches_of = training_batches(
        stream, sequence_length=LENGTH, global_batch=4, micro_batch=2, rank=0, num_ranks=1, seed=3
    )
    parts = [part for step in range(2) for part in batches_of(step)]  # 8 samples: one epoch
    labels = torch.cat([part.labels.flatten() for part in parts])
    assert sorted(labels.tolist()) == list(range(1, 41))
    assert all((part.labels - part.input_ids == 1).all() for part in parts)


def test_the_order_is_a_permutation_that_differs_by_epoch_and_seed() -> None:
    first, second = epoch_order(1, 0, 50), epoch_order(1, 1, 50)
    assert sorted(first.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()
    assert first.tolist() != epoch_order(2, 0, 50).tolist()
    assert [sample_at(p, seed=1, num_samples=50) for p in range(100)] == first.tolist() + second.tolist()
    # pinned: a change of the order would break every resume across versions
    assert epoch_order(1234, 0, 8).tolist() == [0, 1, 2, 7, 5, 6, 3, 4]


@pytest.mark.parametrize(("num_ranks", "micro_batch"), [(1, 8), (1, 2), (2, 2), (4, 1), (8, 1)])
def test_any_number_of_ranks_sees_the_same_global_batch(num_ranks: int, micro_batch: int) -> None:
    stream = _stream(5 * 13 + 1)
    for step in range(4):  # runs over the end of an epoch
        expected = [sample_at(p, seed=9, num_samples=13) for p in range(step * 8, step * 8 + 8)]
        seen = []
        for rank in range(num_ranks):
            batches_of = training_batches(
                stream,
                sequence_length=LENGTH,
                global_batch=8,
                micro_batch=micro_batch,
                rank=rank,
                num_ranks=num_ranks,
                seed=9,
            )
            seen += [sample for part in batches_of(step) for sample in part.samples]
        assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_evaluation_counts_every_sample_once_and_every_rank_alike(num_ranks: int) -> None:
    stream = _stream(5 * 7 + 1)
    shares = [
        evaluation_batches(
            stream, sequence_length=LENGTH, micro_batch=2, rank=rank, num_ranks=num_ranks, num_samples=None
        )
        for rank in range(num_ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    labels = torch.cat([part.labels.flatten() for share in shares for part in share])
    assert sorted(labels[labels != IGNORED].tolist()) == list(range(1, 36))
    limited = evaluation_batches(
        stream, sequence_length=LENGTH, micro_batch=2, rank=0, num_ranks=1, num_samples=3
    )
    assert sum(part.num_labels for part in limited) == 15


def test_unigram_entropy() -> None:
    start = torch.tensor([0])
    uniform = TokenStream(torch.arange(64, dtype=torch.int32).repeat(3), start)
    assert uniform.unigram_entropy() == pytest.approx(4.1588831)
    assert TokenStream(torch.zeros(10, dtype=torch.int32), start).unigram_entropy() == 0


def _documents(*lengths: int) -> TokenStream:
    """Documents of so many tokens; token n stands at place n."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return TokenStream(torch.arange(int(starts[-1]), dtype=torch.int32), starts[:-1])


def test_separated_documents_have_their_own_segments_and_no_label_for_the_next_text() -> None:
    stream = _documents(3, 1, 4, 3)
    (part,) = evaluation_batches(
        stream,
        sequence_length=LENGTH,
        micro_batch=3,
        rank=0,
        num_ranks=1,
        num_samples=None,
        separate_documents=True,
    )
    assert part.samples == [0, 1, -1]
    assert part.segment_ids is not None
    assert part.input_ids.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0] * 5]
    assert part.segment_ids.tolist() == [[1, 1, 1, 2, 3], [1, 1, 1, 2, 2], [0] * 5]
    assert part.labels.tolist() == [[1, 2, -100, -100, 5], [6, 7, -100, 9, 10], [-100] * 5]
    assert part.num_labels == 7


def test_without_separation_attention_and_labels_cross_the_end_of_a_document() -> None:
    batches_of = training_batches(
        _documents(3, 1, 4, 3),
        sequence_length=LENGTH,
        global_batch=2,
        micro_batch=2,
        rank=0,
        num_ranks=1,
        seed=1,
    )
    (part,) = batches_of(0)
    assert part.segment_ids is None
    assert part.num_labels == 10
