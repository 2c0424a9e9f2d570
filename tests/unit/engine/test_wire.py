"""What goes over the engine's socket: all that is meant arrives as it was, and whatever is not meant is a WireError."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import socket
import stat
import struct
import subprocess
import sys
import tempfile

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.core.client import Chunk, Load, ModelFacts, RequestMetrics, Usage
from millstream.core.errors import BadRequest, EngineClosed, MillstreamError, RequestFault, UnknownName
from millstream.core.events import Admitted, Computed, Emitted, Finished, Preempted, Prefilled, Stepped, Submitted
from millstream.core.plan import Logprob, TokenLogprobs
from millstream.core.registry import Choice
from millstream.core.request import Hints, Kind, Limits, Prior, Program, Request, SamplingParams, Slo, Tokens, Vectors
from millstream.core.sequence import Finish, SeqView, Snapshot, Stamps, State
from millstream.engine import wire

LIMIT = 1 << 20
REQUEST = Request(
    41,
    (Tokens((1, 2, 70_000)), Vectors(b"\x00\xff", "float32", (1, 2))),
    SamplingParams(n=2, seed=2**63 - 1, stop=("a", "ü"), logit_bias={3: -1.5}, stop_token_ids=(7,), logprobs=2),
    kind=Kind.SCORE,
    arrival=12.5,
    tenant="t",
    program=Program("p", 3),
    slo=Slo(1.0, 0.5, 60.0),
    priority=-3,
    cache_salt="salt",
    hints=Hints(5),
    decode=Choice("beam", {"width": 2, "length_penalty": 1.5}),
    label="as they call it",
    prior=(Prior(0, (4, 5), -2.5), Prior(1, (), 0.0, True)),
)
CHUNK = Chunk(
    9,
    1,
    (5, 6),
    (TokenLogprobs(Logprob(5, -0.25, 1), (Logprob(5, -0.25, 1), Logprob(8, -2.0, 2))),),
    (None, TokenLogprobs(Logprob(1, -9.0, 40))),
    b"\x01",
    Finish.TIMEOUT,
    "stop",
    "an error",
    Usage(3, 2, 1),
    RequestMetrics(0.1, None, 2.0, 1),
    -1.25,
    (5, 6),
)
FACTS = ModelFacts(
    "m", "/m.gguf", "llama", 10, "Q4_1", "blocks", "float32", Limits(50, 99, 80, frozenset({Kind.GENERATE})), 64, 9
)


def through(message, decode):
    """Sends a message through frames of one byte each."""
    frames = wire.Frames(LIMIT)
    got = [payload for byte in wire.frame(message, LIMIT) for payload in frames.feed(bytes([byte]))]
    assert len(got) == 1
    return decode(got[0])


def test_a_request_arrives_as_it_was_with_an_id_and_an_arrival_of_the_other_side():
    message = through(wire.submit(17, REQUEST, 0.75), wire.to_engine)
    assert (message.id, message.age_s) == (17, 0.75)
    assert wire.request_of(message, 41, 12.5) == REQUEST
    plain = Request(1, (Tokens((1,)),))
    assert wire.request_of(through(wire.submit(0, plain, 0.0), wire.to_engine), 1, 0.0) == plain


@pytest.mark.parametrize(
    "message",
    [
        wire.Hello(1, 2),
        wire.Abort(3),
        wire.Watch(("Finished",)),
        wire.Ask(4, "stats", {"a": [1, {"b": None}]}),
        wire.Alive(),
    ],
)
def test_what_a_client_says_arrives(message):
    assert through(message, wire.to_engine) == message


@pytest.mark.parametrize(
    "message",
    [
        wire.Ready(FACTS),
        wire.News((CHUNK, Chunk(1, 0, (7,)))),
        wire.Refused(3, wire.trouble_of(BadRequest("n", 0, "1 or more"))),
        wire.Answer(4, {"a": 1}),
        wire.Answer(4, trouble=wire.trouble_of(RequestFault("no"))),
        wire.Beat("ready", 5, 4, True, 0.5, Load(1, 2, 3, 4, {"steps": 5.0}), ((7, 0.25),)),
    ],
)
def test_what_an_engine_says_arrives(message):
    assert through(message, wire.to_client) == message


def test_errors_keep_their_kind_and_their_words():
    bad = wire.error_of(wire.trouble_of(BadRequest("top_p", "much", "a number from 0 to 1")))
    assert isinstance(bad, BadRequest) and bad.param == "top_p" and bad.allowed == "a number from 0 to 1"
    assert str(bad) == str(BadRequest("top_p", "much", "a number from 0 to 1"))
    closed = wire.error_of(wire.trouble_of(EngineClosed("it is closed")))
    assert isinstance(closed, EngineClosed) and str(closed) == "it is closed"
    for error in (UnknownName("call", "x", ["y"]), RequestFault("why"), ZeroDivisionError("zero")):
        told = wire.error_of(wire.trouble_of(error))
        assert isinstance(told, MillstreamError) and str(error) in str(told)


def test_events_arrive_with_views_as_they_were():
    still = Snapshot(
        3,
        REQUEST,
        1,
        4,
        2,
        20,
        6,
        5,
        6,
        1,
        2,
        1,
        State.RUNNING,
        ("grammar",),
        Stamps(1.0, 1.5, None, None, None),
        Hints(score=0.5),
    )
    view = SeqView(still)
    events = [
        Submitted(1.0, view),
        Admitted(2.0, view, 7),
        Computed(3.0, view, 4, 1),
        Prefilled(3.5, view, 4, 5),
        Prefilled(3.0, view, 4, 5),
        Emitted(4.0, view, 1),
        Preempted(5.0, view, "swap"),
        Finished(6.0, view, Finish.LENGTH),
        Stepped(7.0, 1, 0.25, 2, 3, 4, 5, 6, 7, 0.125),
    ]
    message = through(wire.Happened(tuple(map(wire.event_out, events))), wire.to_client)
    for event, sent in zip(events, message.events, strict=True):
        got = wire.event_in(sent, REQUEST)
        if not isinstance(event, Stepped):
            assert got.seq.snapshot() == still and got.seq.tenant == "t" and got.seq.gated
            assert sent.seq.request_id == 41 and type(got) is type(event)
            names = [own.name for own in dataclasses.fields(event) if own.name != "seq"]
            assert {n: getattr(got, n) for n in names} == {n: getattr(event, n) for n in names}
        else:
            assert got == event
    for broken in (
        wire.WireEvent("Nothing", 0.0, None, ()),
        wire.WireEvent("Finished", 0.0, None, ("stop",)),
        wire.WireEvent("Finished", 0.0, message.events[0].seq, ("no reason",)),
        wire.WireEvent("Stepped", 0.0, None, (1,)),
    ):
        with pytest.raises(wire.WireError):
            wire.event_in(broken, REQUEST)


# -- what is not meant


@settings(max_examples=300)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(0, 400), max_size=12))
def test_frames_come_out_whole_wherever_the_stream_is_cut(payloads, cuts):
    stream = b"".join(struct.pack(">I", len(payload)) + payload for payload in payloads)
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    frames = wire.Frames(40)
    got = [f for a, b in itertools.pairwise(places) for f in frames.feed(stream[a:b])]
    assert got == payloads


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_frames_or_a_wire_error_and_nothing_else(data):
    frames = wire.Frames(64)
    try:
        for payload in frames.feed(data):
            for decode in (wire.to_engine, wire.to_client):
                with pytest.raises(wire.WireError):
                    decode(payload)
                    raise wire.WireError("it means something by chance")
    except wire.WireError:
        pass


_ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
_TAGS = st.sampled_from(
    ["hello", "submit", "abort", "watch", "ask", "alive", "ready", "news", "refused", "answer", "beat", "happened"]
)


@settings(max_examples=500)
@given(st.one_of(_ANYTHING, st.tuples(_TAGS, _ANYTHING, _ANYTHING, _ANYTHING, _ANYTHING).map(list)))
def test_valid_messagepack_of_another_type_is_a_message_or_a_wire_error(value):
    payload = msgspec.msgpack.encode(value)
    for decode in (wire.to_engine, wire.to_client):
        try:
            message = decode(payload)
        except wire.WireError:
            continue
        if isinstance(message, wire.Submit):
            wire.request_of(message, 1, 0.0)


def test_a_request_out_of_bounds_is_not_a_message():
    raw = msgspec.msgpack.decode(msgspec.msgpack.encode(wire.submit(1, Request(1, (Tokens((1,)),)), 0.0)))
    raw[4]["params"] = {"n": 10**9}
    with pytest.raises(wire.WireError, match="n: got"):
        wire.to_engine(msgspec.msgpack.encode(raw))


def test_a_length_of_four_gigabytes_is_refused_before_anything_of_it_is_kept():
    frames = wire.Frames(LIMIT)
    with pytest.raises(wire.WireError, match="4294967295 bytes, allowed are 1 to 1048576"):
        list(frames.feed(b"\xff\xff\xff\xff" + b"x" * 100))
    with pytest.raises(wire.WireError):
        list(wire.Frames(LIMIT).feed(b"\x00\x00\x00\x00"))


def test_nesting_a_hundred_thousand_deep_is_no_message():
    deep = b"\x91" * 100_000 + b"\xc0"
    for decode in (wire.to_engine, wire.to_client):
        with pytest.raises(wire.WireError):
            decode(deep)
    asked = msgspec.msgpack.encode(["ask", 1, "stats"])[:-1]  # the table of what is given is all nesting
    with pytest.raises(wire.WireError):
        wire.to_engine(b"\x94" + asked[1:] + b"s" + b"\x81\xa1a" + deep)


def test_a_message_longer_than_the_limit_is_not_sent():
    with pytest.raises(wire.WireError, match="allowed are 100"):
        wire.frame(wire.submit(1, Request(1, (Tokens(tuple(range(200))),)), 0.0), 100)


# -- sockets


def test_the_socket_is_closed_to_others_and_takes_a_dead_ones_place(tmp_path):
    path = tmp_path / "run" / "engine.sock"
    first = wire.listen(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    first.close()
    second = wire.listen(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        server, _ = second.accept()
        assert wire.peer_is_us(server) and wire.peer_is_us(client)
        server.close()
    second.close()
    assert [entry.name for entry in path.parent.iterdir()] == ["engine.sock"]


def test_a_folder_that_others_can_enter_is_refused(tmp_path):
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o755)
    with pytest.raises(PermissionError, match="0700"):
        wire.listen(open_folder / "engine.sock")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_connection_from_another_user_is_refused_by_the_system_and_then_by_us():
    """In a folder of its own: the parents of pytest's are closed to others."""
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        path = pathlib.Path(base) / "run" / "engine.sock"
        server = wire.listen(path)

        def visit() -> int:
            """What a process of another user meets."""
            code = f"import os, socket; os.setuid(65534); socket.socket(socket.AF_UNIX).connect({str(path)!r})"
            return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, timeout=30).returncode

        assert visit() != 0, "the folder keeps it out"
        path.parent.chmod(0o755)
        assert visit() != 0, "so does the socket's own mode"
        path.chmod(0o666)
        assert visit() == 0
        accepted, _ = server.accept()
        assert not wire.peer_is_us(accepted), "and the system says whose it is"
        accepted.close()
        server.close()


def test_another_users_process_is_not_us(monkeypatch):
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        assert wire.peer_is_us(one)
        stranger = struct.pack("3i", os.getpid(), os.geteuid() + 1, 0)
        monkeypatch.setattr(wire.socket.socket, "getsockopt", lambda *given: stranger, raising=False)
        assert not wire.peer_is_us(one)
