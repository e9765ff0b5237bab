import pytest

from bc2exp.data import building


@pytest.fixture
def many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches so small that the short files here make many, enough for several processes."""
    monkeypatch.setattr(building, "_BATCH_BYTES", 3000)
