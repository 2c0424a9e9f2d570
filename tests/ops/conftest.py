"""Pages and layouts for attention cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from attention_steps import Step, ask_of, lay_out
from millstream.core import registry
from millstream.ops.attention.protocol import AttentionBackend
from millstream.ops.cases.attention import AttentionCase


@pytest.fixture(name="lay_out")
def _lay_out() -> Callable[..., Step]:
    return lay_out


@pytest.fixture
def backend_for() -> Callable[[str, AttentionCase], AttentionBackend]:
    """A backend by name; skips the test where it refuses the case."""

    def find(name: str, case: AttentionCase) -> AttentionBackend:
        backend: AttentionBackend = registry.make("attention", name)
        refusal = backend.accepts(ask_of(case))
        if refusal is not None:
            pytest.skip(f"{name} refuses: {refusal.reason}")
        return backend

    return find


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
