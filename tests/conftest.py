"""What all suites share: real models where they are, and a bounded number of threads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import millstream  # noqa: F401 - before torch: it tells OpenMP's threads not to spin (tests/unit/core/test_threads.py)
import real


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """Short name -> the model's file; skips the test where this machine has it not."""
    return real.model_path


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    """What a test does to torch's threads ends with it. Tests that never load torch do not load it for this."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    yield
    torch = sys.modules.get("torch")
    if torch is not None and before and torch.get_num_threads() != before:
        torch.set_num_threads(before)
