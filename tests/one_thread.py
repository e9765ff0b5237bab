"""A fixture for folders of tests whose tensors are too small to share among cores that others want."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Run the tests of a module on one thread, and what they share, too: with two, some processors round
    otherwise. A conftest imports this to have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
