"""The pairs use the oracle and tiny models of tests/, and the naive beam search of tests/unit/engine."""

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
for folder in (TESTS, TESTS / "unit" / "engine"):
    sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices gain nothing from more, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
