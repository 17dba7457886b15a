from __future__ import annotations

import pytest

from service.observe.metrics import Metrics

OPENMETRICS = "application/openmetrics-text"


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("text/html", "text/plain"),
        (f"{OPENMETRICS};version=1.0.0,text/plain;version=0.0.4;q=0.5", OPENMETRICS),
    ],
)
async def test_openmetrics_is_written_for_those_who_ask_for_it(
    accept: str, media_type: str
) -> None:
    body, content_type = await Metrics().answer(accept)
    assert content_type.partition(";")[0] == media_type
    assert body.endswith(b"# EOF\n") == (media_type == OPENMETRICS)
    assert b"solo_ready 0.0" in body


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain"),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text"),
        ("application/openmetrics-text; version=x.y", "application/openmetrics-text; version=1.0"),
        ("Application/OpenMetrics-Text;q=0.5, text/plain", "application/openmetrics-text"),
        ("text/plain;version=0.0.4, application/openmetrics-text", "text/plain; version=0.0.4"),
        ("text/html, */*", "text/plain"),
        ("text/plain; version=" + "1" * 5000, "text/plain"),
        ("text/plain; version=\u00b2", "text/plain"),
    ],
)
async def test_the_format_is_one_that_is_asked_for_or_plain(accept: str, content_type: str) -> None:
    body, found = await Metrics().answer(accept)
    assert found.startswith(content_type)
    assert b"solo_ready 0.0" in body
