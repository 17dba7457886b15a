"""What a request says, sent to a real server over a socket; answer, log and metrics."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import CPU_FLAGS, ServerProcess, run_server
from tests.support.waiting import poll_until

ORIGIN = "https://app.test"
PICTURE = encode_picture(draw_picture())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("content")
    publish(root / "repo")
    flags = ("--model-repo", str(root / "repo"), *CPU_FLAGS, "--cors-origins", ORIGIN)
    with run_server(root / "log", *flags, "--log-level", "debug") as running:
        yield running


def connect(server: ServerProcess) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 80), timeout=20)


@pytest.mark.parametrize("path", ["/healthz", "/v2/health/live", "/v2/health/ready", "/metrics"])
def test_head_has_no_body(server: ServerProcess, path: str) -> None:
    request = f"{{}} {path} HTTP/1.1\r\nHost: x\r\n{{}}\r\n"
    with connect(server) as connection:
        connection.sendall(request.format("HEAD", "").encode())
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536)
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ") and body == b""
        assert b"content-length: 0" not in head
        connection.sendall(request.format("GET", "Connection: close\r\n").encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def count(server: ServerProcess, status: int) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    found = [line for line in lines if f'status="{status}"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


@pytest.mark.parametrize("length", ["Content-Length: 5000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("path", ["/segment", "/v2/models/blobs/infer", "/v2/repository/index"])
def test_a_client_that_leaves_in_mid_upload(server: ServerProcess, path: str, length: str) -> None:
    left, failed = count(server, 499), count(server, 500)
    with connect(server) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n"
        connection.sendall(head.encode() + b"5\r\nabcde\r\n")
    poll_until(lambda: count(server, 499) > left, timeout_s=20, pause_s=0.02)
    assert count(server, 499) == left + 1
    assert count(server, 500) == failed
    log = server.read_log()
    assert "Traceback" not in log and " ERROR " not in log
    assert f"DEBUG service.http.middleware: POST {path} 499 " in log


def test_a_path_cannot_forge_a_line_of_the_log(server: ServerProcess) -> None:
    path = "/v2/models/a%0A2026-01-01%2000:00:00,000%20ERROR%20forged%1b[31m%e2%80%a8%c2%9b/infer"
    response = httpx.post(f"{server.url}{path}", content=b"x")
    assert response.status_code == 404
    poll_until(lambda: "/infer 404" in server.read_log(), timeout_s=20, pause_s=0.02)
    log = server.read_log()
    assert r"/v2/models/a\n2026-01-01 00:00:00,000 ERROR forged\x1b[31m\u2028\x9b/infer 404" in log
    assert "\x1b" not in log and "\x9b" not in log and "\u2028" not in log


def test_a_refused_body_is_readable_for_other_origins(server: ServerProcess) -> None:
    head = (
        f"POST /segment HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\n"
        "Content-Length: 9999999999\r\n\r\n"
    )
    with connect(server) as connection:
        connection.sendall(head.encode())
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert f"access-control-allow-origin: {ORIGIN}".encode() in answer


def test_a_form_of_many_codecs_does_not_stop_the_server(server: ServerProcess) -> None:
    body = b'--B\r\nContent-Disposition: form-data; name="masks"\r\n\r\n' + b"a-ka" * 100_000
    kind = "multipart/form-data; charset=punycode; boundary=B"
    response = httpx.post(
        f"{server.url}/segment", content=body + b"\r\n--B--\r\n", headers={"content-type": kind}
    )
    assert response.status_code == 400
    assert "'masks' has more than 4096 bytes" in response.text
    assert httpx.post(f"{server.url}/segment", content=PICTURE).status_code == 200
