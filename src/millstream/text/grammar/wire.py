"""What goes over the pipe between the compiler and its worker: frames of four bytes of length, then MessagePack."""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec

MAX_FRAME = 1 << 26


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """The vocabulary, sent first and once."""

    tokens: list[bytes]
    special_ids: list[int]
    stop_ids: list[int]
    size: int


class Ask(msgspec.Struct, frozen=True, tag=True):
    kind: str
    text: str
    strict: bool
    lead: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """Whether a grammar can be taken; `text` is what to build it from, `warnings` what of it is passed over.

    Of one that cannot, `got` says what is wrong with it, `allowed` what would be right.
    """

    text: str = ""
    warnings: tuple[str, ...] = ()
    got: str = ""
    allowed: str = ""

    @property
    def taken(self) -> bool:
        return not self.got


def frame(message: msgspec.Struct) -> bytes:
    data = msgspec.msgpack.encode(message)
    return struct.pack("<I", len(data)) + data


def read_frame(read: Callable[[int], bytes]) -> bytes | None:
    """The bytes of one message; `read(n)` gives at most n bytes, none at the end. None at the end of all frames.

    Raises EOFError inside of a frame and ValueError for a length that no frame has.
    """
    head = _exactly(read, 4)
    if head is None:
        return None
    (size,) = struct.unpack("<I", head)
    if size > MAX_FRAME:
        raise ValueError(f"a frame of {size} bytes")
    body = _exactly(read, size)
    if body is None and size:
        raise EOFError("the pipe ended inside of a frame")
    return body or b""


def _exactly(read: Callable[[int], bytes], size: int) -> bytes | None:
    got = bytearray()
    while len(got) < size:
        piece = read(size - len(got))
        if not piece:
            if got:
                raise EOFError("the pipe ended inside of a frame")
            return None
        got += piece
    return bytes(got)
