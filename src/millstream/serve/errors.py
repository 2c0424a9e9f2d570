"""What clients are told of an error: status, headers and a body in OpenAI's shape, without path or traceback."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from millstream.core.errors import (
    BadRequest,
    EngineAway,
    EngineClosed,
    MillstreamError,
    RequestFault,
    UnknownModel,
    UnknownName,
)
from millstream.serve.caller import Caller, DeadlinePassed, Overloaded
from millstream.serve.files import TooLarge
from millstream.serve.responses.live import TooManyResponses
from millstream.serve.store import DiskTrouble

# The client has left; it is told nothing, and logs and counts say so.
CLIENT_GONE = 499
AWAY_RETRY_S = 2.0

_log = logging.getLogger("millstream.serve")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    411: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
    504: "timeout_error",
    507: "server_error",
}


class Refused(MillstreamError):
    """Turned away before anything was read of it: by a key, a limit or a form that is not taken."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}
        super().__init__(message)


class ClientGone(MillstreamError):
    """Whoever asked waits no more."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a client is told of an error. `shed` is the reason where there was only no room."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    shed: str = ""

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def telling(error: BaseException) -> Told:
    """What to tell of any error; what is no error of this package's tree is a fault of ours and says no more."""
    if isinstance(error, BadRequest):
        return Told(400, "invalid_value", str(error), error.param)
    if isinstance(error, Overloaded):
        wait = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        code = "draining" if error.status == 503 else "overloaded"
        return Told(error.status, code, str(error), headers=wait, shed=error.reason)
    if isinstance(error, Refused):
        return Told(error.status, error.code, str(error), error.param, error.headers)
    if isinstance(error, UnknownModel):
        return Told(404, "model_not_found", str(error), "model")
    if isinstance(error, UnknownName):
        return Told(404, "not_found", str(error))
    if isinstance(error, TooLarge):
        return Told(413, "too_large", str(error))
    if isinstance(error, TooManyResponses):
        return Told(429, "too_many_responses", str(error), headers={"Retry-After": "5"})
    if isinstance(error, DiskTrouble):
        return Told(
            507, "disk_full", "the disk takes nothing now; it can be tried again", headers={"Retry-After": "30"}
        )
    if isinstance(error, DeadlinePassed):
        return Told(504, "deadline_passed", str(error))
    if isinstance(error, EngineAway):
        wait = {"Retry-After": str(math.ceil(AWAY_RETRY_S))}
        return Told(503, "engine_away", str(error), headers=wait, shed="engine_away")
    if isinstance(error, EngineClosed):
        return Told(503, "draining", "the server is shutting down", headers={"Retry-After": "5"}, shed="draining")
    if isinstance(error, RequestFault):
        return Told(500, "request_failed", str(error))
    if isinstance(error, msgspec.ValidationError):
        return _of_validation(str(error))
    if isinstance(error, msgspec.DecodeError | RecursionError):
        what = str(error) if isinstance(error, msgspec.DecodeError) else "it is nested too deep"
        return Told(400, "invalid_json", f"the body is not valid JSON: {what}")
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        return Told(
            error.status_code,
            "not_found" if error.status_code == 404 else "invalid_request",
            error.detail,
            headers=headers,
        )
    if isinstance(error, ClientGone):
        return Told(CLIENT_GONE, "client_gone", "the client has left")
    return Told(500, "internal_error", "the server failed on this request")


def _of_validation(text: str) -> Told:
    """msgspec says "Expected `int`, got `str` - at `$.messages[0].role`"."""
    what, _, where = text.partition(" - at `")
    param = where.rstrip("`").removeprefix("$").removeprefix(".") or None
    if param is None and "required field `" in what:
        param = what.partition("required field `")[2].partition("`")[0]
    return Told(400, "invalid_value", f"{param}: {what}" if param and param not in what else what, param)


def told(request: Request, error: Exception) -> Response:
    """The response to an error that was raised before any other had begun. Faults of ours are logged, once."""
    known = telling(error)
    caller: Caller | None = getattr(request.state, "caller", None)
    if known.code == "internal_error":
        name = "a request" if caller is None else caller.request_id
        _log.error("%s failed", name, exc_info=(type(error), error, error.__traceback__))
    response = response_of(known)
    if caller is not None:
        response.headers["X-Request-Id"] = caller.label or caller.request_id
    return response


def response_of(known: Told) -> Response:
    return Response(msgspec.json.encode(known.body), known.status, known.headers, "application/json")
