"""Sockets to listen at, and what can be known of them before anything is started."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
from collections.abc import Callable

from millstream.core.errors import ConfigError
from millstream.serve.config import ServeConfig, TlsConfig

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host.strip("[]"), port))
        # Who connects from now on is kept waiting for a moment, and not refused.
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_at(path: str) -> socket.socket:
    """A Unix socket, which only this user may use. Raises OSError; what lies there and is no socket stays."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            _must_be_dead(path)
            os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _must_be_dead(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        try:
            other.connect(path)
        except OSError:
            return
    raise OSError("another process listens there")


def url_of(sock: socket.socket, tls: bool = False) -> str:
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def check_tls(tls: TlsConfig) -> None:
    """Raises ConfigError for certificates that cannot be used."""
    if not tls.certfile:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certfile, tls.keyfile or None)
        if tls.ca_certs:
            ssl.create_default_context(cafile=tls.ca_certs)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"serve.tls: the certificate cannot be used: {error}") from error


def places(config: ServeConfig) -> list[tuple[str, Callable[[], socket.socket]]]:
    """(where, how to listen there): the API's, and the admin's where there is one."""
    if config.uds:
        places = [(config.uds, lambda: listen_at(config.uds))]
    else:
        places = [(f"{config.host}:{config.port}", lambda: listen(config.host, config.port))]
    admin = config.admin
    if admin.port is not None:
        port = admin.port
        places.append((f"{admin.host}:{port}", lambda: listen(admin.host, port)))
    return places
