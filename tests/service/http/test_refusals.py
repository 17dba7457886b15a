from __future__ import annotations

import pytest

from service.errors import BodyTimeout, HeadTimeout, HeadTooLarge, InvalidRequest, Overloaded
from service.http.refusals import build_response, get_reason
from service.observe.metrics import REJECTIONS


@pytest.mark.parametrize(
    ("error", "line", "reason"),
    [
        (InvalidRequest("a"), b"400 Bad Request", "invalid_request"),
        (HeadTimeout("a"), b"408 Request Timeout", "head_timeout"),
        (BodyTimeout("a"), b"408 Request Timeout", "body_timeout"),
        (HeadTooLarge("a"), b"431 Request Header Fields Too Large", "head_too_large"),
        (Overloaded("a", "body_bytes"), b"503 Service Unavailable", "body_bytes"),
    ],
)
def test_a_response_is_complete_and_its_reason_is_counted(
    error: InvalidRequest, line: bytes, reason: str
) -> None:
    head, _, body = build_response(error, "/segment", 7).partition(b"\r\n\r\n")
    first, *headers = head.split(b"\r\n")
    assert first == b"HTTP/1.1 " + line
    assert b"content-length: %d" % len(body) in headers
    assert b"connection: close" in headers
    assert (b"retry-after: 7" in headers) == line.startswith(b"503")
    assert b'"message":"a"' in body
    assert get_reason(error) == reason
    assert reason in REJECTIONS
