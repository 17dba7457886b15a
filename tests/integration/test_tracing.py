"""The real process sends its traces to a collector, and does without one that is not there."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest

from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.collector import run_collector
from tests.support.server import run_server

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def flags(tmp_path: Path) -> tuple[str, ...]:
    publish(tmp_path / "models")
    return ("--model-repo", str(tmp_path / "models"), "--device", "cpu", "--threads", "1")


def segment(url: str) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
    picture = encode_picture(draw_picture())
    response = httpx.post(f"{url}/segment", content=picture, headers=headers, timeout=60)
    assert response.status_code == 200


def test_a_collector_has_every_request_when_the_server_has_ended(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    with run_collector() as collector:
        environment = {"SOLO_OTLP_ENDPOINT": collector.url, "NO_PROXY": "127.0.0.1"}
        with run_server(tmp_path / "log", *flags, environment=environment) as server:
            for _ in range(3):
                segment(server.url)
            server.terminate()
            assert server.wait() == 0
        spans = [span for span in collector.spans if span.name == "POST /segment"]
        assert [span.trace_id.hex() for span in spans] == [TRACE_ID] * 3
        assert {span.parent_span_id.hex() for span in spans} == {SPAN_ID}


def test_a_collector_that_is_not_there_harms_no_request(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    environment = {"SOLO_OTLP_ENDPOINT": nobody, "NO_PROXY": "127.0.0.1"}
    with run_server(tmp_path / "log", *flags, environment=environment) as server:
        segment(server.url)
        server.terminate()
        assert server.wait() == 0
        assert "the last traces could not be exported" in server.read_log()
