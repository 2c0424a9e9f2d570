"""API keys. Each stands for a tenant, by its name, and none is kept as it is.

A key is written in one of these forms, in flags, in the configuration and as the lines of a key file:

    SECRET                        a key that has no name; its tenant is called after a piece of its hash
    NAME:SECRET                   a key, and the tenant that it stands for
    NAME:sha256:HEX               the hash of a key that was made here (`ms-...`), which nobody can guess
    NAME:scrypt:SALT:HEX          the hash of a key that somebody chose

Several keys of one name are one tenant. Whoever asks gives a key as `Authorization: Bearer KEY` or `X-Api-Key: KEY`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from millstream.core.errors import BadFile, ConfigError, nearest
from millstream.serve.caller import Overloaded
from millstream.serve.config import AuthConfig

MADE = "ms-"
# "ms-" and 256 random bits.
_MADE_CHARS = 46
MIN_CHARS, MAX_CHARS = 8, 512
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_FORMS = {"sha256": re.compile(r"[0-9a-f]{64}"), "scrypt": re.compile(r"[0-9a-f]{32}:[0-9a-f]{64}")}
# 16 MiB and some 40 ms: what a guess costs, and what the first request with such a key takes.
_COST, _BLOCK, _LANES = 1 << 14, 8, 1
MAX_REMEMBERED = 4096
MAX_WAITING = 16


def new_key() -> str:
    """A key that nobody guesses."""
    return MADE + secrets.token_urlsafe(32)


def sealed(entry: str) -> str:
    """An entry with the hash of its key in the place of the key. Raises ConfigError."""
    name, form, rest = _parts(entry)
    if form != "plain":
        return f"{name}:{form}:{rest}"
    if _made(rest):
        return f"{name}:sha256:{hashlib.sha256(rest.encode()).hexdigest()}"
    salt = secrets.token_bytes(16)
    return f"{name}:scrypt:{salt.hex()}:{_slow_hash(rest, salt).hex()}"


def _made(key: str) -> bool:
    """Whether it was made here, and so needs no slow hash: a short one of the same beginning was chosen by somebody."""
    return key.startswith(MADE) and len(key) >= _MADE_CHARS


def _parts(entry: str) -> tuple[str, str, str]:
    """(name, plain | sha256 | scrypt, what comes after). Errors never show what may be a key."""
    name, colon, secret = entry.strip().partition(":")
    if not colon:
        name, secret = "", name
    form, _, rest = secret.partition(":")
    if name in _FORMS:
        raise ConfigError(f"an API key begins with {name}:, which is how hashes are told; write it as NAME:{name}:...")
    if form in _FORMS:
        if not _FORMS[form].fullmatch(rest):
            raise ConfigError(f"the API key of {name!r}: its {form} is cut or misspelled; make it anew with --new-key")
    else:
        form, rest = "plain", secret
        if not MIN_CHARS <= len(secret) <= MAX_CHARS or not secret.isascii() or not secret.isprintable():
            raise ConfigError(f"an API key has {MIN_CHARS} to {MAX_CHARS} printable ASCII characters")
    if not name:
        name = f"key-{hashlib.sha256(rest.encode()).hexdigest()[:8]}"
    if not _NAME.fullmatch(name):
        raise ConfigError("the name of an API key has 1 to 64 letters, digits and _ . @ -; write it as NAME:KEY")
    return name, form, rest


def _slow_hash(secret: str, salt: bytes) -> bytes:
    return hashlib.scrypt(secret.encode(), salt=salt, n=_COST, r=_BLOCK, p=_LANES, maxmem=64 << 20, dklen=32)


@dataclass(frozen=True, slots=True)
class _Slow:
    name: str
    salt: bytes
    digest: bytes


class Keyring:
    """All keys of a server. Raises ConfigError for an entry that is none."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._fast: list[tuple[str, bytes]] = []
        self._slow: list[_Slow] = []
        # Keyed by hashes that mean nothing elsewhere: what a slow hash came to, so that each key pays for it once.
        self._secret = secrets.token_bytes(32)
        self._remembered: OrderedDict[bytes, str | None] = OrderedDict()
        self._waiting = 0
        self._thread: ThreadPoolExecutor | None = None
        for entry in entries:
            name, form, rest = _parts(entry)
            if form == "plain":
                # It is not written anywhere from here; in memory a fast hash is as good as a slow one.
                self._fast.append((name, hashlib.sha256(rest.encode()).digest()))
            elif form == "sha256":
                self._fast.append((name, bytes.fromhex(rest)))
            else:
                salt, _, digest = rest.partition(":")
                self._slow.append(_Slow(name, bytes.fromhex(salt), bytes.fromhex(digest)))

    @property
    def tenants(self) -> list[str]:
        """The names that the keys stand for."""
        return sorted({name for name, _ in self._fast} | {one.name for one in self._slow})

    def __len__(self) -> int:
        return len(self._fast) + len(self._slow)

    def find(self, given: str) -> str | None:
        """The tenant of a key whose hash is fast. Every key is looked at, whichever it is."""
        digest = hashlib.sha256(given.encode("latin-1", "replace")).digest()
        found = None
        for name, known in self._fast:
            if hmac.compare_digest(known, digest):
                found = name
        return found

    async def tenant(self, given: str) -> str | None:
        """The tenant that a key stands for, None where there is no such key. Raises Overloaded."""
        if not given or len(given) > MAX_CHARS:
            return None
        found = self.find(given)
        if found is not None or not self._slow or _made(given):
            return found
        mark = hashlib.blake2b(given.encode("latin-1", "replace"), key=self._secret, digest_size=32).digest()
        if mark in self._remembered:
            self._remembered.move_to_end(mark)
            return self._remembered[mark]
        if self._waiting >= MAX_WAITING:
            raise Overloaded("auth", "too many new API keys are being looked at; ask again", 1.0)
        self._waiting += 1
        try:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "millstream-keys")
            found = await asyncio.get_running_loop().run_in_executor(self._thread, self._look, given)
        finally:
            self._waiting -= 1
        self._remembered[mark] = found
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return found

    def _look(self, given: str) -> str | None:
        found = None
        for one in self._slow:
            if hmac.compare_digest(one.digest, _slow_hash(given, one.salt)):
                found = one.name
        return found

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def check_rights(config: AuthConfig, keys: Keyring) -> None:
    """Raises ConfigError for rights of a name that no key has: a key whose limits do not hold is worse than none."""
    for name in config.rights:
        if name not in keys.tenants:
            close = nearest(name, keys.tenants)
            hint = f"; the nearest is {close!r}" if close else ""
            raise ConfigError(f"serve.auth.rights.{name}: there is no key of that name{hint}")


def entries_of(config: AuthConfig) -> list[str]:
    """All keys of a configuration, those of its file too. Raises BadFile."""
    entries = [entry for entry in config.keys if entry.strip()]
    if config.file:
        path = Path(config.file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadFile(path, f"cannot be read: {error}") from error
        entries += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return entries


def key_given(authorization: bytes | None, x_api_key: bytes | None) -> str:
    """The key of a request's headers, "" without one."""
    if authorization is not None:
        scheme, _, rest = authorization.decode("latin-1").partition(" ")
        if scheme.lower() == "bearer" and rest.strip():
            return rest.strip()
    return "" if x_api_key is None else x_api_key.decode("latin-1").strip()
