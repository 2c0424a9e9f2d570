"""The knee of tokens against time: where it is found, what a first start spends on it, and who uses it afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from millstream.core.cache import CacheGroup
from millstream.core.errors import BadRequest, RequestFault
from millstream.engine import knee
from millstream.engine.knee import Bench, Point, find_knee, first_knee, known_knee, measure_knee
from millstream.models.spec import ModelSpec
from millstream.runner.null_runner import NullRunner
from tiny_model import spec

BLOCKS, BLOCK_SIZE = 64, 16


def bench(
    monkeypatch: pytest.MonkeyPatch, cost: Callable[[int], float], context: int = 1025
) -> tuple[Bench, list[int]]:
    """A bench on a clock of its own, on which a step of n tokens takes cost(n) seconds; and the sizes it was asked."""
    now = 0.0
    asked: list[int] = []

    class Timed(NullRunner):
        def collect(self, ticket):  # type: ignore[no-untyped-def]
            nonlocal now
            tokens = sum(len(extend.tokens) for extend in ticket.extends)
            if tokens:
                now += cost(tokens)
                asked.append(tokens)
            return super().collect(ticket)

    model: ModelSpec = spec("llama")
    runner = Timed(model.vocab_size, [CacheGroup("full")], BLOCK_SIZE, BLOCKS)
    monkeypatch.setattr(knee.time, "perf_counter", lambda: now)
    return Bench(runner, model, context, "autoregressive"), asked


def flat_until(size: int, floor: float = 0.01) -> Callable[[int], float]:
    """Seconds of a step that costs the same up to `size` tokens, and in proportion beyond."""
    return lambda tokens: floor * max(1.0, tokens / size)


def test_the_curve_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one, asked = bench(monkeypatch, flat_until(128))
    found = measure_knee(one, repeats=3)
    assert found.step_tokens == 128
    assert [point.tokens for point in found.curve] == [8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024]
    assert all(point.high - point.low < 1e-9 and point.seconds > 0 for point in found.curve)
    # A warm-up and three rounds of each.
    assert len(asked) == 4 * len(found.curve)


def test_a_first_start_stops_where_larger_steps_bring_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    worse = lambda tokens: flat_until(64)(tokens) * (1.2 if tokens > 100 else 1.0)  # noqa: E731
    one, asked = bench(monkeypatch, worse)
    assert first_knee(one).step_tokens == 64
    assert max(asked) == 192


def test_a_first_start_stops_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    one, asked = bench(monkeypatch, flat_until(1024, floor=1.0))
    found = first_knee(one, limit_s=5.0)
    assert sum(flat_until(1024, floor=1.0)(size) for size in asked) <= 5.0
    assert found.step_tokens == found.curve[-1].tokens == max(asked)
    # Slower than the limit altogether: the smallest size is still measured.
    one, asked = bench(monkeypatch, flat_until(8, floor=100.0))
    assert first_knee(one, limit_s=5.0).step_tokens == 8


def test_nothing_that_fits_is_an_error_that_says_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = bench(monkeypatch, flat_until(8), context=5)
    with pytest.raises(BadRequest, match="from 1 to 4"):
        first_knee(one)


def test_a_step_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = bench(monkeypatch, flat_until(8))
    one.runner.fail = dict.fromkeys(range(one.spec.vocab_size), "broken")
    with pytest.raises(RequestFault, match="broken"):
        measure_knee(one, repeats=1)


def test_what_is_kept_is_read_again_and_nonsense_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path))

    class Source:
        def checksum(self) -> str:
            return "c" * 64

    assert known_knee(Source(), "dense") == (None, "")
    path = knee.knee_file(Source(), "dense")
    path.parent.mkdir(parents=True)
    curve = (Point(64, 0.1, 0.1, 0.1),)
    path.write_text(json.dumps(knee.Knee(find_knee(curve), "2026-01-02", curve).as_json()))
    assert known_knee(Source(), "dense") == (64, "measured on 2026-01-02")
    assert known_knee(Source(), "blocks") == (None, "")
    for content in ("", "[]", "{}", '{"step_tokens": "many", "date": ""}'):
        path.write_text(content)
        assert known_knee(Source(), "dense") == (None, "")
