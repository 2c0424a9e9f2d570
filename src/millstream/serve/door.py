"""The way into the server: every request passes here, before any route.

It is given an id, its key is looked up, its route is found, and what it may send is bounded. What goes wrong on the
way, here or in a route, becomes an answer in the shape of the route's API.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect

from millstream.serve.auth import Keyring, key_given
from millstream.serve.body import check_depth
from millstream.serve.caller import ALL_RIGHTS, Caller
from millstream.serve.config import LimitsConfig, ServeConfig, is_loopback
from millstream.serve.errors import CLIENT_GONE, Refused, Told, telling
from millstream.serve.policy import SMALL_BYTES, Access, Body, Entry, Table, openai_errors

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_LABEL = 128
MAX_TRACEPARENT = 64
# Form fields and boundaries around the file of an upload.
FORM_BYTES = 64 << 10
# Before a refusal, what is read of a body that nobody wants: a client that still writes may lose the answer otherwise.
DISCARD_BYTES, DISCARD_S = 1 << 20, 0.5
SMALL_UNREAD = 32 << 10
# From here on brackets are counted on a thread.
ASIDE_BYTES = 256 << 10

_READ = ("host", "origin", "authorization", "x-api-key", "x-request-id", "x-request-timeout", "traceparent",
         "content-type", "content-length", "content-encoding", "transfer-encoding", "expect")  # fmt: skip
_OURS = frozenset({b"x-request-id", b"x-millstream-request-id", b"x-content-type-options", b"x-millstream-warning"})
_NAMES = {name.encode(): name for name in _READ}

_log = logging.getLogger("millstream.serve")


def new_request_id() -> str:
    """Ours: 128 random bits."""
    return "req_" + secrets.token_hex(16)


def pattern_of(scope: Scope) -> str | None:
    """The pattern of the route that was taken."""
    found: str | None = scope.get("millstream.pattern")
    return found


class Salts:
    """What keeps the cached prefixes of tenants apart. It cannot be guessed, nor be the same in two processes."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._known: dict[str, str] = {}  # as many as there are keys

    def of(self, tenant: str) -> str:
        if not tenant:
            return ""
        found = self._known.get(tenant)
        if found is None:
            found = hashlib.blake2b(tenant.encode(), key=self._secret, digest_size=16).hexdigest()
            self._known[tenant] = found
        return found


class Door:
    """An ASGI app. With `admin` it is the door of the admin listener: the only keys are the admin's.

    `keys` and `rights` may be exchanged while requests are inside.
    """

    def __init__(self, table: Table, config: ServeConfig, keys: Keyring, salts: Salts, *, admin: bool = False) -> None:
        self.table, self.config, self.keys, self.salts, self.admin = table, config, keys, salts, admin
        self.rights = config.auth.rights
        self._private = config.private and not config.uds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = _headers(scope)
        caller = Caller(
            new_request_id(), label=_label(headers), traceparent=_traceparent(headers), deadline_s=_deadline(headers)
        )
        state = scope.setdefault("state", {})
        state["caller"] = caller
        body: BoundedBody | None = None
        entry: Entry | None = None
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._mark(message, caller, state)
            await send(message)

        try:
            tenant = await self._tenant(scope, headers)
            try:
                entry, params = self.table.find(scope["method"], self._path(scope))
            except Refused:
                # Who may come in nowhere is not told what there is.
                if tenant is None:
                    raise _no_key(headers) from None
                raise
            scope["millstream.pattern"] = entry.pattern
            if tenant is None and entry.policy.access is not Access.OPEN:
                raise _no_key(headers)
            if tenant:
                rights = self.rights.get(tenant, ALL_RIGHTS)
                caller = replace(caller, tenant=tenant, salt=self.salts.of(tenant), rights=rights)
                state["caller"] = caller
            if entry.look is not None:
                entry.look(caller)
            body = BoundedBody(receive, self._limit(entry, headers), entry.policy.body, self.config.limits)
            scope["path_params"] = params
            await entry.route.app(scope, body, sending)
        except ClientDisconnect:
            return
        except Exception as error:
            known = telling(error)
            if known.status == CLIENT_GONE:
                return
            if known.code == "internal_error":
                _log.error("%s failed", caller.request_id, exc_info=error)
            if started:
                # The connection breaks off here: there is no other way to say that this was not all.
                return
            rest = body or BoundedBody(receive, 0, Body.NONE, self.config.limits, _has_body(headers))
            # Who asks whether to send a body is told no, and reading would say yes. A small one is read over later.
            whole = "expect" not in headers and (_is_small(headers) or await rest.discard())
            shape = openai_errors if entry is None else entry.policy.errors
            await _answer(
                sending, known, shape(known, caller.request_id), close=not whole, head=scope["method"] == "HEAD"
            )

    # -- who

    async def _tenant(self, scope: Scope, headers: dict[str, bytes]) -> str | None:
        """The tenant whose key was given, None without a good key, "" where there are no keys. Raises Refused."""
        self._check_host(headers)
        if not len(self.keys) and not self.admin:
            return ""
        return await self.keys.tenant(key_given(headers.get("authorization"), headers.get("x-api-key")))

    def _path(self, scope: Scope) -> str:
        """The path below `root_path`, whether or not a proxy has cut it off."""
        path: str = scope["path"]
        root = self.config.root_path
        while root and (path == root or path.startswith(root + "/")):
            path = path[len(root) :] or "/"
        return path

    def _check_host(self, headers: dict[str, bytes]) -> None:
        """Keeps pages of other sites away, whose names may come to mean this machine once they are loaded."""
        host = headers.get("host", b"").decode("latin-1")
        name = _host_name(host)
        allowed = self.config.allowed_hosts
        if allowed and not self.admin:
            if name not in allowed and host not in allowed:
                raise Refused(421, "misdirected", f"this server does not answer to the name {name[:100]!r}")
            return
        trusting = not len(self.keys) and self._private
        if (self.admin or trusting) and name and not _is_address(name) and not is_loopback(name):
            raise Refused(
                421, "misdirected", f"this server does not answer to the name {name[:100]!r}: see serve.allowed_hosts"
            )
        origin = headers.get("origin", b"").decode("latin-1")
        if not origin or not (self.admin or trusting):
            return
        own = origin.partition("://")[2] == host
        if self.admin or not (own or origin in self.config.allowed_origins or "*" in self.config.allowed_origins):
            raise Refused(
                403, "forbidden", f"pages of {origin[:100]!r} may not use this server: see serve.allowed_origins"
            )

    # -- what it brings

    def _limit(self, entry: Entry, headers: dict[str, bytes]) -> int:
        """Bytes that the body may have. Raises Refused for one that says beforehand that it is not taken."""
        kind = entry.policy.body
        if kind is Body.NONE:
            limit = SMALL_BYTES
        elif kind is Body.SMALL_JSON:
            limit = min(SMALL_BYTES, self.config.limits.body_bytes)
        elif kind is Body.UPLOAD:
            limit = self.config.files.file_bytes + FORM_BYTES
        else:
            limit = self.config.limits.body_bytes
        length = headers.get("content-length")
        if length is not None:
            if not length.isdigit() or len(length) > 18:
                raise Refused(400, "invalid_value", "Content-Length: not a number of bytes")
            if int(length) > limit:
                raise too_large(limit)
        coding = headers.get("content-encoding", b"identity").strip().lower()
        if coding not in (b"identity", b""):
            raise Refused(415, "unsupported_media_type", "bodies are taken as they are, without Content-Encoding")
        if kind in (Body.JSON, Body.SMALL_JSON) and _has_body(headers):
            given = headers.get("content-type")
            if given is not None and given.partition(b";")[0].strip().lower() != b"application/json":
                raise Refused(
                    415,
                    "unsupported_media_type",
                    "the body must be JSON: Content-Type: application/json",
                    "Content-Type",
                )
        if kind is Body.UPLOAD:
            given = headers.get("content-type", b"")
            if given.partition(b";")[0].strip().lower() != b"multipart/form-data":
                raise Refused(415, "unsupported_media_type", "a file comes as multipart/form-data", "Content-Type")
        return limit

    # -- what is said

    def _mark(self, message: Message, caller: Caller, state: MutableMapping[str, Any]) -> None:
        given = [pair for pair in message.get("headers", ()) if pair[0] not in _OURS]
        ours = caller.request_id.encode()
        given += [
            (b"x-request-id", caller.label.encode("latin-1") or ours),
            (b"x-millstream-request-id", ours),
            (b"x-content-type-options", b"nosniff"),
        ]
        if warnings := state.get("warnings"):
            given.append((b"x-millstream-warning", "; ".join(warnings)[:1000].encode("latin-1", "replace")))
        message["headers"] = given


class BoundedBody:
    """`receive` for a route: at most `limit` bytes, in bounded time, and JSON that is not nested too deep.

    Raises Refused. What it has let pass is not read again.
    """

    def __init__(self, receive: Receive, limit: int, kind: Body, limits: LimitsConfig, expects: bool = True) -> None:
        self._receive, self._limit, self._limits = receive, limit, limits
        self._json = kind in (Body.JSON, Body.SMALL_JSON)
        self._pieces: list[bytes] = []
        self._taken = 0
        self._whole = not expects
        self._started = time.monotonic()

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        message = await self._next()
        if message["type"] != "http.request":
            self._whole = True
            return message
        piece = message.get("body", b"")
        self._taken += len(piece)
        if self._taken > self._limit:
            self._whole = not message.get("more_body", False)
            raise too_large(self._limit)
        if self._json:
            self._pieces.append(piece)
        if not message.get("more_body", False):
            self._whole = True
            if self._json:
                await self._check_depth()
        return message

    async def _next(self) -> Message:
        limits = self._limits
        left_s = self._started + limits.body_s + self._taken / limits.body_rate - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                return await self._receive()
        except TimeoutError:
            raise Refused(408, "too_slow", f"the body did not come within {limits.body_s:g} s") from None

    async def _check_depth(self) -> None:
        whole = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if len(whole) > ASIDE_BYTES:
            await asyncio.to_thread(check_depth, whole, self._limits.json_depth)
        else:
            check_depth(whole, self._limits.json_depth)

    async def discard(self) -> bool:
        """Reads what still comes, for a moment; whether that was all."""
        if self._whole:
            return True
        read = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_S):
                while read < DISCARD_BYTES:
                    message = await self._receive()
                    if message["type"] != "http.request":
                        return False
                    read += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        self._whole = True
                        return True
        return False


def too_large(limit: int) -> Refused:
    return Refused(413, "too_large", f"the body is larger than {limit} bytes, which is all that is taken here")


def _no_key(headers: dict[str, bytes]) -> Refused:
    if "authorization" in headers or "x-api-key" in headers:
        said, code, detail = "there is no such API key", "invalid_api_key", ', error="invalid_token"'
    else:
        said = "an API key is needed: send it as `Authorization: Bearer KEY` or as `X-Api-Key: KEY`"
        code, detail = "missing_api_key", ""
    return Refused(401, code, said, headers={"WWW-Authenticate": f'Bearer realm="millstream"{detail}'})


def _headers(scope: Scope) -> dict[str, bytes]:
    """The headers that are read here; of several of one name the first."""
    found: dict[str, bytes] = {}
    for name, value in scope["headers"]:
        known = _NAMES.get(name)
        if known is not None:
            found.setdefault(known, value)
    return found


def _is_small(headers: dict[str, bytes]) -> bool:
    """Whether it has said that its body is so small that it is sent, or on its way, as a whole."""
    length = headers.get("content-length", b"")
    return "transfer-encoding" not in headers and length.isdigit() and len(length) < 6 and int(length) <= SMALL_UNREAD


def _has_body(headers: dict[str, bytes]) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", b"0") != b"0"


def _label(headers: dict[str, bytes]) -> str:
    given = headers.get("x-request-id", b"")
    text = given.decode("latin-1")
    return text if len(text) <= MAX_LABEL and text.isascii() and text.isprintable() else ""


def _traceparent(headers: dict[str, bytes]) -> str:
    given = headers.get("traceparent", b"")
    return given.decode("ascii", "ignore") if len(given) <= MAX_TRACEPARENT else ""


def _deadline(headers: dict[str, bytes]) -> float | None:
    """Seconds, where they are some; what is wrong with them is told by the route."""
    try:
        found = float(headers["x-request-timeout"])
    except (KeyError, ValueError):
        return None
    return found if 0 < found < math.inf else None


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _is_address(name: str) -> bool:
    if name == "127.0.0.1":
        # The usual one, without what it takes to find that out.
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _answer(send: Send, known: Told, body: dict[str, Any], *, close: bool, head: bool) -> None:
    data = msgspec.json.encode(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    headers += [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in known.headers.items()]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": known.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if head else data})
