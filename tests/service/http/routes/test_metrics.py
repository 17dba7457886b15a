from __future__ import annotations

import re

import httpx
import pytest


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [("*/*", "text/plain"), ("application/openmetrics-text", "application/openmetrics-text")],
)
async def test_the_answer_says_in_which_format_it_is(
    client: httpx.AsyncClient, accept: str, media_type: str
) -> None:
    response = await client.get("/metrics", headers={"accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"].partition(";")[0] == media_type
    assert response.headers["vary"] == "accept"
    assert re.search(r'^solo_ready(\{replica="[^"]+"\})? 1\.0$', response.text, re.MULTILINE)
