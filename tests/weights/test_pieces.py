"""Pieces that are checked and written beside whoever reads them: in order, few at a time, no error lost."""

from __future__ import annotations

import threading

import pytest

from bc2exp.weights import writing
from bc2exp.weights.writing import Pieces


def test_both_see_every_piece_in_order():
    checked, written = [], []
    with Pieces() as pieces:
        for number in range(50):
            pieces.take(lambda n=number: checked.append(n), lambda n=number: written.append(n))
    assert checked == written == list(range(50))


def test_a_reader_waits_where_writing_is_slow():
    gate, begun = threading.Event(), []
    reader_waits = threading.Event()

    def read() -> None:
        with Pieces() as pieces:
            for number in range(writing._PIECES + 2):
                if number == writing._PIECES + 1:
                    reader_waits.set()
                begun.append(number)
                pieces.take(lambda: None, gate.wait)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        assert not reader_waits.wait(0.2)  # it cannot come, however long one waits
        assert len(begun) <= writing._PIECES + 1
    finally:
        gate.set()
        thread.join(30)
    assert reader_waits.is_set()


@pytest.mark.parametrize("which", ["check", "write"])
@pytest.mark.parametrize("last", [True, False])
def test_what_a_piece_raises_is_raised(which, last):
    def fail() -> None:
        raise OSError("no space left")

    def convert() -> None:
        with Pieces() as pieces:
            for number in range(20):
                wrong = number == (19 if last else 3)
                pieces.take(
                    fail if wrong and which == "check" else lambda: None,
                    fail if wrong and which == "write" else lambda: None,
                )

    with pytest.raises(OSError, match="no space left"):
        convert()


def test_an_error_of_the_reader_is_its_own_and_nobody_is_left():
    def convert() -> None:
        with Pieces() as pieces:
            pieces.take(lambda: None, lambda: None)
            raise ValueError("the source is damaged")

    before = threading.active_count()
    with pytest.raises(ValueError, match="damaged"):
        convert()
    assert threading.active_count() == before
