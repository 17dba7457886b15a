"""Where a request comes from."""

from __future__ import annotations

import pytest

from service.http.clients import find_origin


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "origin"),
    [
        ("10.0.0.1", "", "127.0.0.1", "10.0.0.1"),
        ("10.0.0.1", "6.6.6.6", "127.0.0.1", "10.0.0.1"),
        ("127.0.0.1", "10.0.0.9", "127.0.0.1", "10.0.0.9"),
        ("127.0.0.1", "6.6.6.6, 10.0.0.9", "127.0.0.1", "10.0.0.9"),
        ("172.16.0.1", "10.0.0.9, 172.16.0.7", "127.0.0.1, 172.16.0.0/16", "10.0.0.9"),
        ("172.16.0.1", "172.16.0.2, 172.16.0.3", "172.16.0.0/16", "172.16.0.2"),
        ("::1", "2001:db8::7", "::1,127.0.0.1", "2001:db8::7"),
        ("10.0.0.1", "10.0.0.8,10.0.0.9", "*", "10.0.0.8"),
        ("127.0.0.1", " , ", "127.0.0.1", "127.0.0.1"),
        ("", "10.0.0.9", "127.0.0.1", ""),
        ("127.0.0.1", "unknown", "127.0.0.1", "unknown"),
    ],
)
def test_proxies_that_are_trusted_name_their_client(
    peer: str, forwarded: str, trusted: str, origin: str
) -> None:
    assert find_origin(peer, forwarded, trusted) == origin
