from __future__ import annotations

import pytest
from grpc import StatusCode

from service.errors import STATUS_BY_CODE
from service.grpc.status import MAX_TEXT, find_status, shorten


@pytest.mark.parametrize("code", STATUS_BY_CODE)
def test_every_error_says_whose_fault_it_is(code: str) -> None:
    status = find_status(STATUS_BY_CODE[code], code)
    servers = (StatusCode.INTERNAL, StatusCode.UNAVAILABLE, StatusCode.UNIMPLEMENTED)
    assert (status in servers) == (STATUS_BY_CODE[code] >= 500 and code != "deadline_exceeded")
    assert status not in (StatusCode.OK, StatusCode.UNKNOWN)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid_parameter", StatusCode.INVALID_ARGUMENT),
        ("too_many_images", StatusCode.INVALID_ARGUMENT),
        ("body_too_large", StatusCode.RESOURCE_EXHAUSTED),
        ("quota_exceeded", StatusCode.RESOURCE_EXHAUSTED),
        ("unauthorized", StatusCode.UNAUTHENTICATED),
        ("forbidden", StatusCode.PERMISSION_DENIED),
        ("unknown_model", StatusCode.NOT_FOUND),
        ("draining", StatusCode.UNAVAILABLE),
        ("deadline_exceeded", StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_the_status_is_that_of_the_protocol(code: str, status: StatusCode) -> None:
    assert find_status(STATUS_BY_CODE[code], code) is status


def test_a_text_fits_into_a_header() -> None:
    assert shorten("a" * MAX_TEXT) == "a" * MAX_TEXT
    long = shorten("a" * (MAX_TEXT + 1))
    assert len(long) == MAX_TEXT
    assert long.endswith("a...")
