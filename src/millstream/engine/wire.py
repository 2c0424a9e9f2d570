"""What an engine process and its clients say to each other: frames of MessagePack over a Unix socket.

A frame is its length (4 bytes, big-endian) and one message. Both sides say `Hello` first. Requests go with ids of the
client's choosing, below 2**40; chunks come back with the same. All news of one step travel in one frame.

    client                            engine
    Hello, Submit, Abort, Watch,      Hello, Ready, News, Refused, Happened, Answer, Beat
    Ask, Alive

Nothing here does I/O but `listen` and `peer_is_us`: bytes in, messages out. Whatever is not a message raises WireError,
and nothing else: a frame that lies about its length, bytes that are no MessagePack, a message of another type.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import struct
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from millstream.core.client import Chunk, Load, ModelFacts
from millstream.core.errors import BadRequest, EngineClosed, MillstreamError, UnknownName
from millstream.core.events import Event
from millstream.core.request import Hints, Request, Segment, Tokens, Vectors
from millstream.core.sequence import Finish, SeqView, Snapshot, Stamps, State
from millstream.engine.feed import KINDS

VERSION = 1
MAX_ID = 1 << 40

# A prompt of a million tokens is 5 MB. Logprobs of a long prompt with all alternatives are some 100 MB.
MAX_TO_ENGINE = 32 << 20
MAX_TO_CLIENT = 256 << 20

_LENGTH = struct.Struct(">I")


class WireError(MillstreamError):
    """What came over a socket is not what was agreed on."""


# -- messages


class Hello(msgspec.Struct, array_like=True, tag="hello", frozen=True):
    """The first word of both sides. `pid` is the speaker's own."""

    version: int
    pid: int


class _TokensSegment(msgspec.Struct, array_like=True, tag="t", frozen=True, gc=False):
    ids: tuple[int, ...]


class _VectorsSegment(msgspec.Struct, array_like=True, tag="v", frozen=True, gc=False):
    data: bytes
    dtype: str
    shape: tuple[int, int]


def _without(kind: type, *left_out: str) -> type[msgspec.Struct]:
    """A struct of the fields of a dataclass. What is added to the dataclass is on the wire at once."""
    hints = typing.get_type_hints(kind)
    fields: list[Any] = []
    for own in dataclasses.fields(kind):
        if own.name in left_out:
            continue
        if own.default is not dataclasses.MISSING:
            default: Any = own.default
        elif own.default_factory is not dataclasses.MISSING:
            default = msgspec.field(default_factory=own.default_factory)
        else:
            default = msgspec.NODEFAULT
        fields.append((own.name, hints[own.name], default))
    return msgspec.defstruct(f"Wire{kind.__name__}", fields, omit_defaults=True, frozen=True, module=__name__)


# The id is the frame's; of the prompt MessagePack cannot tell the kinds apart; the arrival is another clock's.
_REST = ("id", "prompt", "arrival")
WireRequest = _without(Request, *_REST)
_REST_FIELDS = tuple(own.name for own in dataclasses.fields(Request) if own.name not in _REST)


class Submit(msgspec.Struct, array_like=True, tag="submit", frozen=True):
    """A request that arrived `age_s` seconds before it was sent, by the sender's clock."""

    id: int
    age_s: float
    prompt: tuple[_TokensSegment | _VectorsSegment, ...]
    rest: WireRequest  # type: ignore[valid-type]


class Abort(msgspec.Struct, array_like=True, tag="abort", frozen=True):
    id: int


class Watch(msgspec.Struct, array_like=True, tag="watch", frozen=True):
    """From now on events of these kinds (class names) are wanted; of none: no more."""

    kinds: tuple[str, ...]


class Ask(msgspec.Struct, array_like=True, tag="ask", frozen=True):
    """One of `engine/calls.py` is to be run."""

    id: int
    name: str
    given: dict[str, Any]


class Alive(msgspec.Struct, array_like=True, tag="alive", frozen=True):
    """A client's answer to a Beat: its event loop turns."""


class Ready(msgspec.Struct, array_like=True, tag="ready", frozen=True):
    """The model is loaded: requests are taken."""

    facts: ModelFacts


class News(msgspec.Struct, array_like=True, tag="news", frozen=True):
    """The chunks of one step."""

    chunks: tuple[Chunk, ...]


class Trouble(msgspec.Struct, array_like=True, frozen=True):
    """An error on its way: `kind` is its class, where that is one of a few, else MillstreamError."""

    kind: str
    text: str
    param: str = ""
    got: str = ""
    allowed: str = ""


class Refused(msgspec.Struct, array_like=True, tag="refused", frozen=True):
    """A request was not taken."""

    id: int
    trouble: Trouble


class Answer(msgspec.Struct, array_like=True, tag="answer", frozen=True):
    id: int
    value: Any = None
    trouble: Trouble | None = None


class Beat(msgspec.Struct, array_like=True, tag="beat", frozen=True):
    """How the engine gets on; sent several times a second whatever it does, also while the model loads.

    `phase` is loading, ready or draining. `turns` counts the turns of its loop, `steps` the steps that came back;
    `busy`: there is work inside. `idle_s` is how long no turn has ended, which says something only of a busy one.
    `clients` are the process ids of those that are connected, and for how many seconds each has said nothing.
    """

    phase: str
    turns: int
    steps: int
    busy: bool
    idle_s: float
    load: Load
    clients: tuple[tuple[int, float], ...] = ()


class Seen(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A view of a sequence on the wire: `core/sequence.py`, Snapshot."""

    id: int
    request_id: int
    index: int
    num_prompt: int
    num_output: int
    max_len: int
    known: int
    computed: int
    next_start: int
    left: int
    cached: int
    preemptions: int
    state: State
    gates: tuple[str, ...]
    stamps: Stamps
    hints: Hints


class WireEvent(msgspec.Struct, array_like=True, frozen=True):
    """An event: its kind, its time, the view where it has one, and the other fields in order."""

    kind: str
    now: float
    seq: Seen | None
    rest: tuple[int | float | str, ...]


class Happened(msgspec.Struct, array_like=True, tag="happened", frozen=True):
    events: tuple[WireEvent, ...]


ToEngine = Hello | Submit | Abort | Watch | Ask | Alive
ToClient = Hello | Ready | News | Refused | Answer | Beat | Happened

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_client: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)

T = TypeVar("T")


# -- frames


def frame(message: ToEngine | ToClient, limit: int) -> bytes:
    """A message as it goes over the socket. Raises WireError when it cannot be said, or not in `limit` bytes."""
    out = bytearray(_LENGTH.size)
    try:
        _encoder.encode_into(message, out, _LENGTH.size)
    except Exception as error:
        # Integers of more than 64 bits, half of a surrogate pair, an object of no plain kind.
        raise WireError(f"cannot be said in MessagePack: {error}") from None
    length = len(out) - _LENGTH.size
    if length > limit:
        raise WireError(f"a message of {length} bytes, allowed are {limit}")
    _LENGTH.pack_into(out, 0, length)
    return bytes(out)


class Frames:
    """Cuts a byte stream into frames. Memory is taken for what came, never for what a length promises."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are whole now. Raises WireError for one that is longer than the limit, or of length 0."""
        self._data += data
        start = 0
        try:
            while len(self._data) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._data, start)
                if not 0 < length <= self.limit:
                    raise WireError(f"a frame of {length} bytes, allowed are 1 to {self.limit}")
                stop = start + _LENGTH.size + length
                if len(self._data) < stop:
                    break
                payload = bytes(memoryview(self._data)[start + _LENGTH.size : stop])
                start = stop
                yield payload
        finally:
            del self._data[:start]


def to_engine(payload: bytes) -> ToEngine:
    """Raises WireError."""
    return _decode(_to_engine, payload)


def to_client(payload: bytes) -> ToClient:
    """Raises WireError."""
    return _decode(_to_client, payload)


def _decode(decoder: msgspec.msgpack.Decoder[T], payload: bytes) -> T:
    try:
        return decoder.decode(payload)
    except Exception as error:
        # Besides msgspec's own: what the checks of dataclasses raise, and the bounds of recursion and of numbers.
        raise WireError(f"not a message: {type(error).__name__}: {error}") from None


# -- requests, errors, events


def submit(wire_id: int, request: Request, age_s: float) -> Submit:
    """A request as a message."""
    prompt = tuple(
        _TokensSegment(segment.ids)
        if isinstance(segment, Tokens)
        else _VectorsSegment(segment.data, segment.dtype, segment.shape)
        for segment in request.prompt
    )
    rest = WireRequest(**{name: getattr(request, name) for name in _REST_FIELDS})
    return Submit(wire_id, age_s, prompt, rest)


def request_of(message: Submit, request_id: int, arrival: float) -> Request:
    """The request that a message holds."""
    prompt: tuple[Segment, ...] = tuple(
        Tokens(segment.ids)
        if isinstance(segment, _TokensSegment)
        else Vectors(segment.data, segment.dtype, segment.shape)
        for segment in message.prompt
    )
    rest = {name: getattr(message.rest, name) for name in _REST_FIELDS}
    return Request(request_id, prompt, arrival=arrival, **rest)


def trouble_of(error: BaseException) -> Trouble:
    if isinstance(error, BadRequest):
        return Trouble("BadRequest", str(error), error.param, repr(error.got), error.allowed)
    if isinstance(error, EngineClosed):
        return Trouble("EngineClosed", str(error))
    if isinstance(error, UnknownName):
        return Trouble("UnknownName", str(error))
    if isinstance(error, MillstreamError):
        return Trouble("MillstreamError", str(error))
    return Trouble("MillstreamError", f"{type(error).__name__}: {error}")


class _Quoted:
    """Says what it was given, without quotes around it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def error_of(trouble: Trouble) -> MillstreamError:
    """The error that the other side met, as near as it can be told."""
    if trouble.kind == "BadRequest":
        return BadRequest(trouble.param, _Quoted(trouble.got), trouble.allowed)
    if trouble.kind == "EngineClosed":
        return EngineClosed(trouble.text)
    return MillstreamError(trouble.text)


def event_out(event: Event) -> WireEvent:
    """An event as it is now."""
    seen = None
    rest: list[int | float | str] = []
    for name in _EVENT_FIELDS[type(event)]:
        value = getattr(event, name)
        if isinstance(value, SeqView):
            still = value.snapshot()
            values = {own: getattr(still, own) for own in _SEEN_FIELDS}
            seen = Seen(request_id=still.request.id, **values)
        elif name != "now":
            rest.append(value.value if isinstance(value, Finish) else value)
    return WireEvent(type(event).__name__, event.now, seen, tuple(rest))


def event_in(event: WireEvent, request: Request | None) -> Event:
    """The event again, its view over `request`. Raises WireError for what is no event."""
    kind = KINDS.get(event.kind)
    if kind is None:
        raise WireError(f"there is no event {event.kind!r}")
    values: dict[str, Any] = {"now": event.now}
    rest = iter(event.rest)
    try:
        for name in _EVENT_FIELDS[kind]:
            if name == "seq":
                if event.seq is None or request is None:
                    raise WireError(f"a {event.kind} event of no request")
                own = {field: getattr(event.seq, field) for field in _SEEN_FIELDS}
                values["seq"] = SeqView(Snapshot(request=request, **own))
            elif name == "reason":
                values["reason"] = Finish(next(rest))
            elif name != "now":
                values[name] = next(rest)
        return kind(**values)
    except (StopIteration, ValueError) as error:
        raise WireError(f"a {event.kind} event with {len(event.rest)} values that do not fit") from error


_EVENT_FIELDS = {kind: tuple(own.name for own in dataclasses.fields(kind)) for kind in KINDS.values()}
_SEEN_FIELDS = tuple(own.name for own in dataclasses.fields(Snapshot) if own.name != "request")


# -- sockets


def listen(path: Path, backlog: int = 16) -> socket.socket:
    """A Unix socket that only this user can reach: mode 0600, in a folder of mode 0700 which is made where it is not.

    A socket file that a dead process left there is replaced. Raises OSError.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = path.parent.stat()
    if held.st_uid != os.geteuid() or held.st_mode & 0o077:
        raise PermissionError(f"{path.parent} must belong to this user and be closed to all others (mode 0700)")
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(fresh))
        fresh.chmod(0o600)
        sock.listen(backlog)
        # At no moment is there a socket at this path that does not answer because it was made and not yet opened.
        fresh.rename(path)
    except BaseException:
        sock.close()
        fresh.unlink(missing_ok=True)
        raise
    return sock


def peer_is_us(sock: socket.socket) -> bool:
    """Whether the process at the other end runs as this user (or as root), as the system says it."""
    if hasattr(socket, "SO_PEERCRED"):
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return uid in (os.geteuid(), 0)
    return True  # the mode of the file and of its folder must do
