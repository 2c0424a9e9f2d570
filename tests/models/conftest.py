"""Models for the tests of this folder: tiny random ones written by transformers, and the real ones where they are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The oracle lies one folder up, beside all the suites that use it.
sys.path.insert(0, str(Path(__file__).parents[1]))

REAL = {
    "smollm2-135m": "smollm2-135m.gguf",
    "gemma3-270m": "gemma3-270m.gguf",
    "qwen2.5-coder-1.5b": "qwen2.5-coder-1.5b.gguf",
}


def find_real(name: str) -> Path:
    """The file of a real model in the folder that MILLSTREAM_TEST_MODELS names; skips the test where it is not."""
    folder = os.environ.get("MILLSTREAM_TEST_MODELS")
    if not folder:
        pytest.skip("MILLSTREAM_TEST_MODELS names no folder of real models")
    path = Path(folder) / REAL[name]
    if not path.is_file():
        pytest.skip(f"{REAL[name]} is not in the folder that MILLSTREAM_TEST_MODELS names")
    return path


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    return find_real


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)
