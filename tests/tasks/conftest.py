"""On one thread; the ranks are those of the tests of layouts."""

from tests.one_thread import one_thread
from tests.parallel.conftest import one_rank, ranks, two_ranks

__all__ = ["one_rank", "one_thread", "ranks", "two_ranks"]
