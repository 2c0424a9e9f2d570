"""`[serve]` of the configuration: small frozen dataclasses, one a part of the server."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from millstream.core.errors import ConfigError
from millstream.serve.batch_lines import BatchLimits
from millstream.serve.caller import Rights
from millstream.serve.files import FileLimits
from millstream.serve.observatory import WatchConfig
from millstream.serve.responses.kept import KeptLimits
from millstream.serve.service import ApiConfig


@dataclass(frozen=True, slots=True)
class AuthConfig:
    """`keys` and the lines of `file` are written as `auth.py` tells. Without any, everybody is let in, which a server
    that others can reach only does when `allow_unauthenticated`. `rights` are by the names of keys; those that are not
    named may do everything."""

    keys: tuple[str, ...] = ()
    file: str = ""
    allow_unauthenticated: bool = False
    rights: Mapping[str, Rights] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """What one client may take of the server before its request is understood.

    A request has `header_s` seconds for its head, of at most `headers` headers and `header_bytes` bytes, and `body_s`
    for its body, and more at `body_rate` bytes a second. `connections` are open at once at most; when there are that
    many, those that wait for a next request are closed first, as they are after `idle_s`. Who reads nothing of what is
    ready for `stall_s` is cut off.
    """

    body_bytes: int = 16 << 20
    header_bytes: int = 32 << 10
    headers: int = 128
    json_depth: int = 128
    connections: int = 4096
    header_s: float = 10.0
    body_s: float = 30.0
    body_rate: int = 64 << 10
    idle_s: float = 75.0
    stall_s: float = 60.0

    def __post_init__(self) -> None:
        _positive("serve.limits", self)


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """How much may wait for its first token: requests, tokens of their prompts, and the seconds that a new one would.

    Of one tenant at most `tenant_requests` are inside, and `tenant_tokens_per_min` tokens of prompts are taken. 0 is
    no limit.
    """

    queued_requests: int = 1024
    queued_tokens: int = 1 << 20
    max_wait_s: float = 30.0
    tenant_requests: int = 0
    tenant_tokens_per_min: int = 0

    def __post_init__(self) -> None:
        _positive("serve.admission", self, zero=True)


@dataclass(frozen=True, slots=True)
class AdminConfig:
    """The second listener, off without a `port`; 0 takes a free one. `key` is written as those of `[serve.auth]`."""

    host: str = "127.0.0.1"
    port: int | None = None
    key: str = ""

    def __post_init__(self) -> None:
        _port("serve.admin.port", self.port)
        if self.port is not None and not self.key:
            raise ConfigError(
                "serve.admin.key: got none, and whoever reaches the admin port may stop the server; "
                "`millstream serve --new-key admin` makes one"
            )


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Files in PEM. With `ca_certs` clients must show a certificate of one of these."""

    certfile: str = ""
    keyfile: str = ""
    ca_certs: str = ""

    def __post_init__(self) -> None:
        if not self.certfile and (self.keyfile or self.ca_certs):
            raise ConfigError("serve.tls.certfile: got none, needed with a key file or CA certificates")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Where to listen, for whom, and how much of it. Port 0 takes a free one, which the log tells.

    `uds` is the path of a Unix socket to listen at instead. `root_path` is what a proxy cuts off the paths. Browsers
    may ask from pages of `allowed_origins` ("*": any). `allowed_hosts` are the names a client may call this server by;
    without any, a server on loopback without keys is called by loopback's names and by addresses only. `folder` is
    where files, batches and responses are kept: "" is one a port under the cache folder.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str = ""
    root_path: str = ""
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    folder: str = ""
    auth: AuthConfig = field(default_factory=AuthConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    admin: AdminConfig = field(default_factory=AdminConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    files: FileLimits = field(default_factory=FileLimits)
    batches: BatchLimits = field(default_factory=BatchLimits)
    responses: KeptLimits = field(default_factory=KeptLimits)

    def __post_init__(self) -> None:
        _port("serve.port", self.port)
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"serve.root_path: got {self.root_path!r}, allowed is /like/this")
        for origin in self.allowed_origins:
            if origin != "*" and ("://" not in origin or origin.endswith("/")):
                raise ConfigError(f"serve.allowed_origins: got {origin!r}, allowed are * or http(s)://name:port")

    @property
    def private(self) -> bool:
        """Whether only this machine can reach it."""
        return bool(self.uds) or is_loopback(self.host)

    def check(self, has_keys: bool) -> None:
        """Raises ConfigError for a server that anybody could use without anybody having said so."""
        if not has_keys and not self.private and not self.auth.allow_unauthenticated:
            raise ConfigError(
                f"serve.host: {self.host} can be reached from other machines, and there are no API keys. Give "
                "--api-key (`millstream serve --new-key NAME` makes one), or say --allow-unauthenticated to let "
                "everybody in"
            )


def is_loopback(host: str) -> bool:
    """Whether a host, as one listens at or is called by, is this machine to itself."""
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _port(name: str, port: int | None) -> None:
    if port is not None and not 0 <= port <= 65535:
        raise ConfigError(f"{name}: got {port}, allowed is 0 to 65535")


def _positive(where: str, config: Any, zero: bool = False) -> None:
    for name in config.__dataclass_fields__:
        value = getattr(config, name)
        if value < 0 or (value == 0 and not zero):
            raise ConfigError(f"{where}.{name}: got {value}, allowed are numbers {'from' if zero else 'above'} 0")


_SECRET = frozenset({"key", "keys", "password", "token", "secret"})


def without_secrets(tree: Any, name: str = "") -> Any:
    """A configuration as it may be shown: of keys their names alone."""
    if isinstance(tree, Mapping):
        return {key: without_secrets(value, str(key)) for key, value in tree.items()}
    if name in _SECRET:
        if isinstance(tree, list | tuple):
            return [without_secrets(one, name) for one in tree]
        if not isinstance(tree, str) or not tree:
            return tree
        label, colon, _ = tree.partition(":")
        return f"{label}:***" if colon else "***"
    return [without_secrets(one) for one in tree] if isinstance(tree, list | tuple) else tree
