"""The lines of a batch, as OpenAI's batch API has them: one request a line in, one result a line out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

MAX_CUSTOM_ID = 512


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Requests of one batch, bytes of one line, and how many wrong lines are told of one batch."""

    requests: int = 50_000
    line_bytes: int = 4 << 20
    errors: int = 100


DEFAULT_LIMITS = BatchLimits()


class Line(msgspec.Struct, frozen=True):
    """One request. `body` is its JSON as it was written."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with a line; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request came to: the status and the JSON body that it would have had over HTTP."""

    status: int
    body: bytes
    request_id: str = ""


class _Body(msgspec.Struct, frozen=True):
    stream: Any = None


_decode = msgspec.json.Decoder(Line).decode
_decode_body = msgspec.json.Decoder(_Body).decode


def read_lines(file: IO[bytes], limits: BatchLimits, skip: frozenset[int] = frozenset()) -> Iterator[tuple[int, Any]]:
    """(number from 1, Line or LineError) of each line that is not empty and whose number is not in `skip`.

    A line over the limit is read past, never held.
    """
    number = 0
    while raw := file.readline(limits.line_bytes + 1):
        number += 1
        if len(raw) > limits.line_bytes and not raw.endswith(b"\n"):
            while (rest := file.readline(limits.line_bytes)) and not rest.endswith(b"\n"):
                pass
            yield number, LineError("line_too_long", f"the line has more than {limits.line_bytes} bytes", number)
        elif number not in skip and raw.strip():
            yield number, parse_line(raw, number)


def parse_line(raw: bytes, number: int) -> Line | LineError:
    """A line, or what is wrong with it alone."""
    try:
        line = _decode(raw)
    except msgspec.ValidationError as error:
        return LineError("invalid_request_line", f"the line is no request: {error}", number, _param(str(error)))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return LineError("invalid_json_line", f"the line is not valid JSON: {error}", number)
    if not 0 < len(line.custom_id) <= MAX_CUSTOM_ID:
        return LineError("invalid_custom_id", f"custom_id has 1 to {MAX_CUSTOM_ID} characters", number, "custom_id")
    if line.method != "POST":
        return LineError("invalid_method", f"method is POST, got {line.method[:20]!r}", number, "method")
    try:
        body = _decode_body(line.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return LineError("invalid_request_line", f"body is no JSON object: {error}", number, "body")
    if body.stream not in (None, False):
        return LineError("invalid_request_line", "a request of a batch has no stream", number, "body.stream")
    return line


def check_file(path: Path, endpoint: str, limits: BatchLimits) -> tuple[int, list[LineError]]:
    """How many requests a batch has, and what is wrong with its lines: the first `limits.errors` of all."""
    errors: list[LineError] = []
    seen: dict[str, int] = {}
    count = 0
    with path.open("rb") as file:
        for number, line in read_lines(file, limits):
            count += 1
            if isinstance(line, LineError):
                error: LineError | None = line
            elif line.url != endpoint:
                said = f"the batch is of {endpoint}, the line's url is {line.url[:200]!r}"
                error = LineError("mismatched_url", said, number, "url")
            elif line.custom_id in seen:
                said = f"custom_id {line.custom_id!r} is that of line {seen[line.custom_id]} too"
                error = LineError("duplicate_custom_id", said, number, "custom_id")
            else:
                error = None
                seen[line.custom_id] = number
            if error is not None:
                errors.append(error)
            if len(errors) >= limits.errors:
                break
            if count > limits.requests:
                errors.append(LineError("too_many_requests", f"a batch has at most {limits.requests} requests"))
                break
    if count == 0:
        errors.append(LineError("empty_file", "the file has no requests"))
    return count, errors


def result_line(result_id: str, custom_id: str, answer: Answer) -> bytes:
    """A line of an output or error file."""
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": msgspec.Raw(answer.body)}
    line = {"id": result_id, "custom_id": custom_id, "response": response, "error": None}
    return msgspec.json.encode(line) + b"\n"


def error_line(result_id: str, custom_id: str, code: str, message: str) -> bytes:
    """A line for a request that was not answered at all."""
    error = {"code": code, "message": message}
    return msgspec.json.encode({"id": result_id, "custom_id": custom_id, "response": None, "error": error}) + b"\n"


def _param(text: str) -> str | None:
    """The field that a validation error of msgspec names: "... - at `$.custom_id`", "missing required field `url`"."""
    parts = text.split("`")
    return parts[-2].removeprefix("$").removeprefix(".") or None if len(parts) > 2 else None
