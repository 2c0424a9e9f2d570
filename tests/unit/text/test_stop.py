"""Stop strings, against searching the whole text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import small_tokenizer
from millstream.core.errors import BadRequest
from millstream.text.stop import StopMatcher
from millstream.text.stream import StreamText
from millstream.text.vocabulary import Vocabulary

SMALL = st.text(alphabet="abé🎉", max_size=14)
STOPS = st.lists(st.text(alphabet="abé🎉", min_size=1, max_size=4), max_size=4)


def naive(stops: list[bytes], data: bytes) -> tuple[int, int] | None:
    """(start, end) of the match that ends first, the longest of those."""
    for end in range(1, len(data) + 1):
        found = [stop for stop in stops if data[:end].endswith(stop)]
        if found:
            return end - max(map(len, found)), end
    return None


@settings(max_examples=400, deadline=None)
@given(
    stops=st.lists(st.binary(min_size=1, max_size=4).map(lambda b: bytes(c % 2 for c in b)), max_size=4),
    data=st.binary(max_size=24).map(lambda b: bytes(c % 2 for c in b)),
    step=st.integers(1, 5),
)
def test_matches_and_held_bytes_equal_a_search(stops: list[bytes], data: bytes, step: int) -> None:
    matcher = StopMatcher(stops)
    expected = naive(stops, data)
    for at in range(0, len(data), step):
        match = matcher.push(data[at : at + step])
        seen = data[: at + step]
        if match:
            assert expected == (match.start, match.end) and match.stop == data[match.start : match.end]
            assert stops[match.index] == match.stop and matcher.held == 0 and matcher.safe_bytes == match.start
            assert matcher.push(b"more") is match
            return
        longest = max((n for stop in stops for n in range(len(stop)) if n and seen.endswith(stop[:n])), default=0)
        assert matcher.held == longest and matcher.safe_bytes == len(seen) - longest
    assert expected is None


def test_the_match_that_ends_first_wins_then_the_longest() -> None:
    match = StopMatcher(["abcd", "bc"]).push(b"abcd")
    assert match and (match.stop, match.start, match.end) == ("bc", 1, 3)
    match = StopMatcher(["c", "bc", "abc"]).push(b"abc")
    assert match and match.stop == "abc" and match.index == 2


@pytest.mark.parametrize("stop", [[""], [b""], [3], [None], ["\ud800"]])
def test_impossible_stop_strings_are_refused(stop: Any) -> None:
    with pytest.raises(BadRequest, match="stop"):
        StopMatcher(stop)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), text=SMALL, stops=STOPS, include=st.booleans())
def test_streamed_pieces_equal_the_cut_whole(data: st.DataObject, text: str, stops: list[str], include: bool) -> None:
    raw = text.encode()
    edges = sorted({0, len(raw), *data.draw(st.lists(st.integers(0, len(raw)), max_size=8))})
    tokens = [raw[a:b] for a, b in zip(edges, edges[1:], strict=False)]  # noqa: RUF007
    stream = StreamText(Vocabulary.from_bytes(tokens), stops, include_stop_str_in_output=include)
    pieces = [stream.push([i]) for i in range(len(tokens))] + [stream.finish()]
    expected = naive([s.encode() for s in stops], raw)
    if expected:
        assert stream.stopped and stream.stop_reason == raw[expected[0] : expected[1]].decode()
        assert stream.text == raw[: expected[1] if include else expected[0]].decode()
        assert len(b"".join(tokens[: stream.num_tokens])) >= expected[1]
        assert len(b"".join(tokens[: stream.num_tokens - 1])) < expected[1]
    else:
        assert not stream.stopped and stream.stop_reason is None and stream.text == text
    assert "".join(pieces) == stream.text


@pytest.mark.parametrize("kind", ["bpe", "spm", "spm-plain"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_ids_stream_as_they_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = small_tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=25))
    whole = tokenizer.decode(ids, continuation=True)
    at = data.draw(st.integers(0, max(len(whole) - 2, 0)))
    stop = whole[at : at + data.draw(st.integers(1, 4))]
    stops = [stop] if stop and "�" not in stop else []
    stream = StreamText(tokenizer, stops)
    pieces = [stream.push([i]) for i in ids] + [stream.finish()]
    assert "".join(pieces) == stream.text == (whole[: whole.index(stop)] if stops else whole)


def test_nothing_that_may_be_a_stop_string_is_shown() -> None:
    stream = StreamText(Vocabulary.from_bytes([b"Hello \n", b"\nUs", b"er", b":", b"x"]), ["\n\nUser:"])
    assert stream.push([0]) == "Hello " and stream.push([1]) == "" and stream.push([2]) == ""
    assert stream.push([3]) == "" and stream.stopped and stream.text == "Hello " and stream.num_tokens == 4
    assert stream.push([4]) == "" and stream.finish() == "" and stream.num_tokens == 4


def test_control_tokens_do_not_break_a_stop_string() -> None:
    stream = StreamText(Vocabulary.from_bytes([b"ST", b"<eos>", b"OP"], [1]), ["STOP"])
    assert stream.push([0, 1, 2]) == "" and stream.stop_reason == "STOP"
