from pathlib import Path

import pytest
import torch

from bc2exp.config.errors import UserError
from bc2exp.data import tokens as tokens_module
from bc2exp.data.store import TokenStore
from bc2exp.data.tokens import TokenStream, require_samples
from tests.data.stores import streams_of, write_by_hand

SPLIT = [949, 50, 1]


def _documents(count: int) -> list[list[int]]:
    """Documents of 1 to 7 tokens, all tokens different."""
    documents, token = [], 0
    for number in range(count):
        length = number * 5 % 7 + 1
        documents.append(list(range(token, token + length)))
        token += length
    return documents


def _store(folder: Path, documents: list[list[int]]) -> TokenStore:
    write_by_hand(folder / "s", documents)
    return TokenStore(folder / "s")


def test_a_store_is_cut_as_documents_in_memory_are(tmp_path: Path) -> None:
    for count in (1, 2, 19, 20, 950, 1000, 1499):
        documents = _documents(count)
        in_memory = streams_of(documents, SPLIT)
        stored = _store(tmp_path, documents).streams(SPLIT)
        assert [s.num_documents for s in stored] == [s.num_documents for s in in_memory]
        assert [s.tokens.tolist() for s in stored] == [s.tokens.tolist() for s in in_memory]
        assert [s.digest() for s in stored] == [s.digest() for s in in_memory]
        for ours, theirs in zip(stored, in_memory, strict=True):
            for index in range(min(5, ours.num_samples(8))):
                assert ours.segments(index, 8).tolist() == theirs.segments(index, 8).tolist()


def test_949_50_1_of_real_sizes_rounds_by_documents(tmp_path: Path) -> None:
    # 52,002 · 949/1000 = 49,349.898; 52,002 · 999/1000 = 51,949.998
    parts = _store(tmp_path, [[1]] * 52_002).streams(SPLIT)
    assert [part.num_documents for part in parts] == [49_350, 2_600, 52]


def test_every_token_of_an_epoch_is_seen_once_in_every_part(tmp_path: Path) -> None:
    documents, length = _documents(1000), 16
    parts = _store(tmp_path, documents).streams(SPLIT)
    seen: list[int] = []
    for part in parts:
        begin = len(seen)
        for index in range(part.num_samples(length)):
            sample = part.sample(index, length)
            # the first token of a sample is the last label of the one before
            assert index == 0 or int(sample[0]) == seen[-1]
            seen += sample[1 if index else 0 :].tolist()
        missing = len(part.tokens) - (len(seen) - begin)
        assert 0 <= missing < length or part.num_samples(length) == 0
        seen += part.tokens[len(part.tokens) - missing :].tolist()
    assert seen == list(range(sum(map(len, documents))))


def test_segments_are_the_documents_of_the_tokens(tmp_path: Path) -> None:
    documents, length = _documents(200), 11
    owner = [number for number, ids in enumerate(documents) for _ in ids]
    for part in _store(tmp_path, documents).streams([3, 1]):
        for index in range(part.num_samples(length)):
            owners = [owner[token] for token in part.sample(index, length).tolist()]
            segments = part.segments(index, length)
            assert segments.dtype == torch.int32
            assert segments.tolist() == [number - owners[0] + 1 for number in owners]


def test_a_sample_is_the_callers_own(tmp_path: Path) -> None:
    # the map under it is read-only: writing there would end the process
    (stream,) = _store(tmp_path, [[1, 2, 3, 4]]).streams([1])
    stream.sample(0, 3).zero_()
    assert stream.tokens.tolist() == [1, 2, 3, 4]


def test_digests_tell_streams_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(tokens: torch.Tensor) -> TokenStream:
        return TokenStream(tokens, torch.tensor([0]))

    monkeypatch.setattr(tokens_module, "_CHUNK_TOKENS", 8)
    monkeypatch.setattr(tokens_module, "_DIGEST_BLOCKS", 4)
    small = torch.arange(30, dtype=torch.int32)
    assert stream(small).digest() == stream(small.to(torch.int64)).digest()
    assert stream(small).digest() == stream(small.to(torch.uint16)).digest()
    for place in range(30):
        other = small.clone()
        other[place] += 1
        assert stream(other).digest() != stream(small).digest()
    assert stream(small[:29]).digest() != stream(small).digest()
    # beyond four blocks, every second of eight counts, and the number of tokens
    large = torch.arange(64, dtype=torch.int32)
    sampled, skipped = large.clone(), large.clone()
    sampled[17] += 1
    skipped[9] += 1
    assert stream(sampled).digest() != stream(large).digest() == stream(skipped).digest()
    # of 8 blocks as well, and the same ones of them
    assert stream(large[:63]).digest() != stream(large).digest()


def test_entropy_by_chunks_is_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.tensor([3, 3, 0, 7, 7, 7, 1, 50, 2, 2, 2], dtype=torch.int32)
    stream = TokenStream(tokens, torch.tensor([0]))
    whole = stream.unigram_entropy()
    probabilities = torch.tensor([2, 1, 3, 1, 1, 3], dtype=torch.float64) / 11
    assert whole == pytest.approx(float(-(probabilities * probabilities.log()).sum()))
    monkeypatch.setattr(tokens_module, "_CHUNK_TOKENS", 3)
    assert stream.unigram_entropy() == pytest.approx(whole)
    monkeypatch.setattr(tokens_module, "STATISTICS_TOKENS", 3)
    assert stream.unigram_entropy() == pytest.approx(0.6365141682948128)  # of 3 3 0


def test_too_few_tokens_are_named() -> None:
    stream = TokenStream(torch.arange(8, dtype=torch.int32), torch.tensor([0]))
    require_samples(stream, 7, "a part")
    with pytest.raises(
        UserError, match=r"dataset\.sequence_length=8: a part has only 8 tokens, .* the 9 of one"
    ):
        require_samples(stream, 8, "a part")
