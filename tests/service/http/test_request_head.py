from __future__ import annotations

import pytest

from service.http.request_head import check_head, rebuild_head

HOST = (b"host", b"a:80")


@pytest.mark.parametrize(
    "host", [b"a", b"a.b-c:80", b"[::1]:80", b"127.0.0.1", b"", b" a ", b"a_b", b"%41"]
)
def test_hosts_that_are_taken(host: bytes) -> None:
    assert check_head(b"GET", "1.1", [(b"host", host)]) is None


@pytest.mark.parametrize("host", [b"a b", b"a/b", b"u@a", b"a#", b"a?", b"\xff", b'a"', b"a\\"])
def test_hosts_that_are_not(host: bytes) -> None:
    assert check_head(b"GET", "1.1", [(b"host", host)]) is not None


@pytest.mark.parametrize(
    ("version", "headers", "wrong"),
    [
        ("1.1", [HOST], None),
        ("1.1", [HOST, (b"transfer-encoding", b"chunked")], None),
        ("1.1", [HOST, (b"transfer-encoding", b" Chunked ")], None),
        ("1.0", [], None),
        ("1.0", [HOST], None),
        ("1.1", [], "the request has no Host header"),
        ("1.1", [HOST, HOST, HOST], "the request has 3 Host headers"),
        ("1.0", [HOST, HOST], "the request has 2 Host headers"),
        ("1.0", [(b"transfer-encoding", b"chunked")], "HTTP/1.0 has no Transfer-Encoding"),
        (
            "1.1",
            [HOST, (b"transfer-encoding", b"gzip, chunked")],
            "Transfer-Encoding 'gzip, chunked' is not supported",
        ),
        ("0.9", [], "HTTP/0.9 is not supported"),
        ("2.0", [HOST], "HTTP/2.0 is not supported"),
    ],
)
def test_versions_and_headers(
    version: str, headers: list[tuple[bytes, bytes]], wrong: str | None
) -> None:
    assert check_head(b"POST", version, headers) == wrong


def test_connect_is_refused() -> None:
    assert check_head(b"CONNECT", "1.1", [HOST]) == "CONNECT is not supported"


def test_a_rebuilt_head_lacks_the_upgrade_alone() -> None:
    headers = [
        HOST,
        (b"upgrade", b"h2c"),
        (b"connection", b"keep-alive, UPGRADE , HTTP2-Settings"),
        (b"content-length", b"3"),
        (b"upgrade", b"websocket"),
    ]
    assert rebuild_head(b"POST", b"/a?b", "1.1", headers) == (
        b"POST /a?b HTTP/1.1\r\nhost: a:80\r\nconnection: keep-alive, HTTP2-Settings\r\n"
        b"content-length: 3\r\n\r\n"
    )
