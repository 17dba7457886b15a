"""What RFC 9112 requires of a request's head beyond what llhttp checks."""

from __future__ import annotations

import re
from collections.abc import Iterable

Headers = Iterable[tuple[bytes, bytes]]

_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")


def check_head(method: bytes, version: str, headers: Headers) -> str | None:
    """What is wrong with a head.

    Args:
        method: As sent.
        version: "1.1" or what else was sent.
        headers: Names in lower case.

    Returns:
        The fault, or None.
    """
    if method == b"CONNECT":
        return "CONNECT is not supported"
    if version not in ("1.1", "1.0"):
        return f"HTTP/{version} is not supported"
    hosts = []
    for name, value in headers:
        if name == b"host":
            hosts.append(value)
        elif name == b"transfer-encoding":
            if version == "1.0":
                return "HTTP/1.0 has no Transfer-Encoding"
            if value.strip().lower() != b"chunked":
                return f"Transfer-Encoding {value.decode('latin-1')!r} is not supported"
    if len(hosts) > 1:
        return f"the request has {len(hosts)} Host headers"
    if not hosts:
        return "the request has no Host header" if version == "1.1" else None
    if not _HOST.fullmatch(hosts[0].strip()):
        return f"Host {hosts[0].decode('latin-1')!r} is not valid"
    return None


def rebuild_head(method: bytes, target: bytes, version: str, headers: Headers) -> bytes:
    """A parsed head as bytes, without the headers that ask for an upgrade."""
    lines = [b"%b %b HTTP/%b" % (method, target, version.encode())]
    for name, value in headers:
        if name == b"upgrade":
            continue
        if name == b"connection":
            tokens = [token.strip() for token in value.split(b",")]
            value = b", ".join(token for token in tokens if token.lower() != b"upgrade")
        lines.append(b"%b: %b" % (name, value))
    return b"\r\n".join([*lines, b"", b""])
