"""Bodies of requests: bytes to bounded types, and what of them nobody knows."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeVar

import msgspec
from starlette.requests import Request

from millstream.core.errors import BadRequest, nearest
from millstream.serve.errors import Refused

T = TypeVar("T", bound=msgspec.Struct)

MAX_DEPTH = 128
MAX_KEYS = 512
MAX_WARNED = 8

_keys = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def check_depth(body: bytes, most: int = MAX_DEPTH) -> None:
    """Raises Refused for brackets nested deeper than `most`: decoders recurse. Brackets inside of strings count too
    where there are that many of them, which costs a second look."""
    if body.count(b"[") + body.count(b"{") <= most:
        return
    depth, inside, skip = 0, False, False
    for byte in body:
        if skip:
            skip = False
        elif inside:
            if byte == 0x5C:
                skip = True
            elif byte == 0x22:
                inside = False
        elif byte == 0x22:
            inside = True
        elif byte in b"[{":
            depth += 1
            if depth > most:
                raise Refused(400, "invalid_json", f"the body is nested deeper than {most} levels")
        elif byte in b"]}":
            depth -= 1


async def read(request: Request, kind: type[T], *, strict: bool = False, ignored: Collection[str] = ()) -> T:
    """The body as `kind`. Fields that it does not know, but for those of `ignored`, are told in a header of the
    response, or refused when `strict`. Raises BadRequest, Refused and msgspec's errors."""
    content_type = request.headers.get("content-type", "application/json")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "unsupported_media_type", "the body must be JSON: Content-Type: application/json")
    body = await request.body()
    if not body:
        raise Refused(400, "invalid_json", "the body is empty; a JSON object is expected")
    check_depth(body)
    try:
        asked = msgspec.json.decode(body, type=kind)
    except UnicodeDecodeError as error:
        raise Refused(400, "invalid_json", f"the body is not valid UTF-8: {error.reason}") from None
    known = kind.__struct_encode_fields__
    given = _keys(body)
    if len(given) > MAX_KEYS:
        raise BadRequest("body", f"{len(given)} fields", f"at most {MAX_KEYS}")
    check_known(request, given, known, strict=strict, ignored=ignored)
    return asked


def check_known(
    request: Request,
    given: Iterable[str],
    known: Collection[str],
    *,
    strict: bool,
    ignored: Collection[str] = (),
    within: str = "",
) -> None:
    """Fields that are not known are told in a header of the response, or refused when `strict`. Raises BadRequest.

    `within` is the path of the object that they lie in.
    """
    unknown = [name for name in given if name not in known and name not in ignored]
    if not unknown:
        return
    if strict:
        close = nearest(unknown[0], known)
        hint = f"; the nearest is {close!r}" if close else ""
        raise BadRequest(f"{within}{unknown[0][:80]}", "a field", f"none of that name{hint}")
    shown = ", ".join(within + _label(name) for name in unknown[:MAX_WARNED])
    more = f" and {len(unknown) - MAX_WARNED} more" if len(unknown) > MAX_WARNED else ""
    request.state.warnings = [*getattr(request.state, "warnings", []), f"ignored: {shown}{more}"]


def warn(request: Request, text: str) -> None:
    """Tells the client something beside the answer, in X-Millstream-Warning."""
    safe = "".join(char if " " <= char <= "~" else "?" for char in text)[:400]
    request.state.warnings = [*getattr(request.state, "warnings", []), safe]


def _label(name: str) -> str:
    return "".join(char if "!" <= char <= "~" else "?" for char in name[:40])
