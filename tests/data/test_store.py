import json
import struct
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bc2exp.config.errors import UserError
from bc2exp.data.store import TokenStore
from bc2exp.data.store_writer import StoreWriter
from tests.data.kills import dies_at
from tests.data.stores import write_by_hand

DOCUMENTS = [[5, 6, 7], [8], [9, 10], [0, 125_695, 3, 4]]


def _write(prefix: Path, documents: list[list[int]], *, at_once: int = 1) -> str:
    with StoreWriter(prefix) as writer:
        for start in range(0, len(documents), at_once):
            part = documents[start : start + at_once]
            writer.add(array("i", map(len, part)), array("i", [token for ids in part for token in ids]))
        return writer.finish()


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_files_are_byte_for_byte_what_the_format_says(tmp_path: Path, at_once: int) -> None:
    write_by_hand(tmp_path / "hand", DOCUMENTS)
    _write(tmp_path / "ours", DOCUMENTS, at_once=at_once)
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"hand.{kind}").read_bytes()
    # and once without any code, for the smallest store
    _write(tmp_path / "one", [[258]])
    assert (tmp_path / "one.bin").read_bytes().hex() == "02010000"
    assert (tmp_path / "one.idx").read_bytes().hex() == (
        "4d4d494449445800000100000000000000040100000000000000020000000000000001000000"
        "0000000000000000" + "00000000000000000100000000000000"
    )


def test_tables_longer_than_a_chunk(tmp_path: Path) -> None:
    documents = [[n] * (n % 3 + 1) for n in range(2**16 + 5)]
    write_by_hand(tmp_path / "hand", documents)
    _write(tmp_path / "ours", documents, at_once=1000)
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "hand.idx").read_bytes()
    assert TokenStore(tmp_path / "ours").num_documents == len(documents)


@pytest.mark.parametrize("name", ["store", "store.bin", "store.idx"])
def test_a_store_is_named_by_its_prefix_or_either_file(tmp_path: Path, name: str) -> None:
    _write(tmp_path / "store", DOCUMENTS)
    store = TokenStore(tmp_path / name)
    assert store.prefix == tmp_path / "store"
    assert store.tokens.tolist() == [token for document in DOCUMENTS for token in document]
    assert store.num_documents == 4


@pytest.mark.parametrize(("code", "dtype"), [(4, torch.int32), (5, torch.int64), (8, torch.uint16)])
def test_the_types_that_megatron_writes(tmp_path: Path, code: int, dtype: torch.dtype) -> None:
    documents = [[1, 2], [65_535], [3, 4, 5]]
    write_by_hand(tmp_path / "a", documents, code=code)
    store = TokenStore(tmp_path / "a")
    assert store.tokens.dtype == dtype
    first, second, _ = store.streams([2, 1, 0])
    assert first.sample(0, 2).tolist() == [1, 2, 65_535]
    assert first.sample(0, 2).dtype == torch.int32
    assert first.segments(0, 2).tolist() == [1, 1, 2]
    assert second.tokens.tolist() == [3, 4, 5]
    with pytest.raises(UserError, match=r"token 65535 at 2 \(document 2\) .* vocabulary of 65535"):
        store.check_vocabulary(65_535)
    store.check_vocabulary(65_536)


def test_documents_of_several_sequences_and_empty_ones(tmp_path: Path) -> None:
    # sentences [1 2] [3] | [] | [4 5 6] and a document without any sequence at the end
    write_by_hand(tmp_path / "a", [[1, 2], [3], [], [4, 5, 6]], first_sequences=[0, 2, 3, 4, 4])
    store = TokenStore(tmp_path / "a")
    assert store.num_documents == 4
    (stream,) = store.streams([1])
    assert stream.segments(0, 5).tolist() == [1, 1, 1, 2, 2, 2]
    parts = store.streams([1, 1, 1, 1])
    assert [part.tokens.tolist() for part in parts] == [[1, 2, 3], [], [4, 5, 6], []]
    assert [part.num_samples(2) for part in parts] == [1, 0, 1, 0]


def test_the_writer_knows_the_largest_token(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "a") as writer:
        assert writer.max_token == -1
        for tokens, largest in (([5, 9], 9), ([], 9), ([7], 9), ([0] * 20_000 + [11] + [0] * 30_000, 11)):
            writer.add(array("i", [len(tokens)] if tokens else []), array("i", tokens))
            assert writer.max_token == largest


def test_an_unfinished_store_leaves_nothing(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "a") as writer:
        writer.add(array("i", [2]), array("i", [1, 2]))
        assert not (tmp_path / "a.bin").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    _write(tmp_path / "a", DOCUMENTS)
    _write(tmp_path / "a", [[1, 2]])
    assert TokenStore(tmp_path / "a").tokens.tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_a_kill_at_any_step_leaves_the_old_store_the_new_one_or_none(tmp_path: Path) -> None:
    steps, died, seen = 0, True, set()
    while died:
        prefix = tmp_path / str(steps) / "a"
        prefix.parent.mkdir()
        # as many tokens and documents: a mixture would not be noticed by its size
        _write(prefix, [[1, 1], [1]])
        died = dies_at(steps, lambda prefix=prefix: _write(prefix, [[2], [2, 2]]))
        if not prefix.with_name("a.idx").exists():
            seen.add("none")
        else:
            stream = TokenStore(prefix).streams([1])[0]
            found = (stream.tokens.tolist(), stream.segments(0, 2).tolist())
            assert found in (([1, 1, 1], [1, 1, 2]), ([2, 2, 2], [1, 2, 2]))
            seen.add("old" if found[0][0] == 1 else "new")
        steps += 1
    assert seen == {"old", "none", "new"}


def _cut(kind: str, size: int) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = prefix.with_name(f"{prefix.name}.{kind}")
        path.write_bytes(path.read_bytes()[:size])

    return damage


def _patch(offset: int, value: bytes, kind: str = "idx") -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = prefix.with_name(f"{prefix.name}.{kind}")
        content = bytearray(path.read_bytes())
        content[offset : offset + len(value)] = value
        path.write_bytes(content)

    return damage


def _remove(kind: str) -> Callable[[Path], None]:
    return lambda prefix: prefix.with_name(f"{prefix.name}.{kind}").unlink()


def _i(value: int) -> bytes:
    return struct.pack("<i", value)


def _q(value: int) -> bytes:
    return struct.pack("<q", value)


# DOCUMENTS: header 34 bytes, lengths 3 1 2 4 at 34, pointers 0 12 16 24 at 50, documents 0 1 2 3 4 at 82
DAMAGES = {
    "no idx": (_remove("idx"), r"s\.idx: cannot be read \(No such file"),
    "no bin": (_remove("bin"), r"s\.bin: cannot be read \(No such file"),
    "empty idx": (_cut("idx", 0), r"s\.idx: is not the index"),
    "header cut": (_cut("idx", 20), r"s\.idx: is truncated: 20 bytes, not even its header"),
    "magic": (_patch(0, b"TNTIDX\0\0"), r"s\.idx: is not the index .* begins with b'TNTIDX"),
    "version": (_patch(9, _q(2)), r"s\.idx: has version 2"),
    "type": (_patch(17, b"\x07"), r"s\.idx: holds tokens of type 7"),
    "idx cut": (
        _cut("idx", 121),
        r"s\.idx: is truncated: 121 bytes, where 4 sequences and 4 documents need 122",
    ),
    "idx too long": (_patch(122, b"\0"), r"s\.idx: is too long: 123 bytes"),
    "bin cut": (_cut("bin", 39), r"s\.bin: is truncated: 39 bytes, where the 10 tokens .* need 40"),
    "bin empty": (_cut("bin", 0), r"s\.bin: is truncated: 0 bytes"),
    "bin too long": (_patch(40, b"\0\0\0\0", "bin"), r"s\.bin: is longer than its index says: 44 bytes"),
    "length": (
        _patch(42, _i(3)),
        r"s\.idx: pointers do not fit the lengths: sequence 3 begins at byte 24 where 28",
    ),
    "last length": (_patch(46, _i(5)), r"s\.bin: is truncated: 40 bytes, where the 11 tokens"),
    "negative length": (_patch(38, _i(-1)), r"s\.idx: sequence 1 has a negative length"),
    "pointer": (_patch(58, _q(16)), r"s\.idx: pointers do not fit the lengths: sequence 1 begins at byte 16"),
    "first document": (
        _patch(82, _q(1)),
        r"s\.idx: the documents do not fit the sequences: they go from 1 to 4",
    ),
    "last document": (
        _patch(114, _q(5)),
        r"s\.idx: the documents do not fit .* from 0 to 5, where there are 4",
    ),
    "documents in disorder": (_patch(90, _q(3)), r"s\.idx: the documents do not fit the sequences"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named_with_its_file(tmp_path: Path, damage: str) -> None:
    write_by_hand(tmp_path / "s", DOCUMENTS)
    harm, message = DAMAGES[damage]
    harm(tmp_path / "s")
    with pytest.raises(UserError, match=message) as error:
        TokenStore(tmp_path / "s")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_an_empty_store_is_named(tmp_path: Path, documents: list[list[int]]) -> None:
    write_by_hand(tmp_path / "s", documents)
    with pytest.raises(UserError, match=r"s\.idx: the store is empty"):
        TokenStore(tmp_path / "s")


@pytest.mark.parametrize(("token", "place"), [(64_000, 9), (-1, 4)])
def test_a_token_outside_of_the_vocabulary_is_named(tmp_path: Path, token: int, place: int) -> None:
    documents = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    documents[2 if place > 6 else 1][place - (7 if place > 6 else 3)] = token
    write_by_hand(tmp_path / "s", documents)
    expected = rf"s\.bin: token {token} at {place} \(document {3 if place > 6 else 2}\)"
    with pytest.raises(UserError, match=expected):
        TokenStore(tmp_path / "s").check_vocabulary(64_000)


def test_a_report_spares_the_scan_where_it_is_of_this_store(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "s", [[1, 2, 99]])
    store, report = TokenStore(tmp_path / "s"), tmp_path / "report.json"

    def scanned() -> bool:
        try:
            store.check_vocabulary(64)
        except UserError:
            return True
        return False

    good = {"prefix": "s", "tokens": 3, "max_token": 5}
    report.write_text(json.dumps(good))
    assert not scanned()
    others = ({"prefix": "t"}, {"tokens": 4}, {"max_token": 64}, {"max_token": -1}, {"max_token": None})
    for other in others:
        report.write_text(json.dumps({**good, **other}))
        assert scanned(), other
    report.write_text("{")
    assert scanned()
