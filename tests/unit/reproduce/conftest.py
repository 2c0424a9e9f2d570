from __future__ import annotations

import types

import pytest

from millstream.reproduce import harness


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection before each made-up measurement would be nearly all of the time these tests take."""
    monkeypatch.setattr(harness, "gc", types.SimpleNamespace(collect=lambda: 0))
