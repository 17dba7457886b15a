"""Streamed answers: progress, time-outs and errors, against a server on a real socket."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from solo_client import (
    AsyncClient,
    Busy,
    Client,
    ConnectionFailed,
    ImageFailed,
    Progress,
    RequestRefused,
    Result,
    Retry,
    ServerFailed,
    SoloError,
    TimedOut,
    UnexpectedAnswer,
)
from solo_client.answer import AnswerParser
from tests.solo_client.conftest import INSTANCE, answer, found
from tests.solo_client.fake_server import FakeServer, Part, line, progress, stream

COUNTS = {"canvases": 3, "instances_found": 7, "truncated": True}
RESULT = line(result=answer({**found(INSTANCE), **COUNTS}))
ADMITTED = progress(0, 3, 0.0)
JSON_BODY = json.dumps(answer(found(INSTANCE))).encode()
PLAIN: list[Part] = [
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    % len(JSON_BODY),
    JSON_BODY,
]
AT_ONCE = Retry(attempts=3, backoff_s=0)
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not used, but slow to load with certificates


def segment_sync(
    url: str, *, timeout_s: float | None = 20.0, retry: Retry = AT_ONCE, **options: Any
) -> Result:
    transport = httpx.HTTPTransport(verify=TLS)
    with Client(url, timeout_s=timeout_s, retry=retry, transport=transport) as client:
        return client.segment(b"file", **options)


def segment_async(
    url: str, *, timeout_s: float | None = 20.0, retry: Retry = AT_ONCE, **options: Any
) -> Result:
    async def ask() -> Result:
        transport = httpx.AsyncHTTPTransport(verify=TLS)
        async with AsyncClient(
            url, timeout_s=timeout_s, retry=retry, transport=transport
        ) as client:
            return await client.segment(b"file", **options)

    return asyncio.run(ask())


both = pytest.mark.parametrize("segment", [segment_sync, segment_async])
Segment = Callable[..., Result]


def refuse(status: int, code: str, **more: Any) -> bytes:
    return line(error={"code": code, "message": "why"}, status=status, **more)


@both
def test_progress_is_reported_and_the_result_is_the_last_line(segment: Segment) -> None:
    seen: list[Progress] = []
    lines = [ADMITTED, progress(0, 3, 2.0), progress(1, 3, 3.0), progress(3, 3, 4.0), RESULT]
    with FakeServer(stream(*lines)) as server:
        result = segment(server.url, on_progress=seen.append)
    assert "accept: application/x-ndjson, application/json;q=0.9\n" in server.heads[0].lower()
    assert [(p.done, p.total, p.elapsed_s) for p in seen] == [
        (0, 3, 0.0),
        (0, 3, 2.0),
        (1, 3, 3.0),
        (3, 3, 4.0),
    ]
    assert [p.remaining_s for p in seen] == [None, None, 2.0, 0.0]
    assert [i.category for i in result.instances] == ["red"]
    assert (result.canvases, result.instances_found, result.truncated) == (3, 7, True)


@both
def test_warnings_of_the_server_are_passed_on(segment: Segment) -> None:
    warnings = [{"code": "unusual_image", "message": "why", "more": 1}]
    bodies = [line(result=answer({**found(INSTANCE), "warnings": w})) for w in (warnings, None)]
    with FakeServer(*map(stream, bodies)) as server:
        result = segment(server.url)
        assert [(w.code, w.message) for w in result.warnings] == [("unusual_image", "why")]
        assert segment(server.url).warnings == ()


@both
def test_a_server_with_plain_json_is_read_too(segment: Segment) -> None:
    seen: list[Progress] = []
    with FakeServer(PLAIN) as server:
        result = segment(server.url, on_progress=seen.append)
    assert len(result.instances) == 1
    assert seen == []
    assert (result.canvases, result.instances_found, result.truncated) == (None, None, False)


@both
def test_an_answer_with_more_and_with_fewer_fields_is_read(segment: Segment) -> None:
    old = {"model": "blobs", "version": 2, "results": [found(INSTANCE)]}
    new = {**answer({**found({**INSTANCE, "colour": "red"}), "colour": 1}), "colour": {}}
    with FakeServer(stream(line(result=old)), stream(line(result=new, colour=1))) as server:
        for result in (segment(server.url), segment(server.url)):
            assert [instance.area for instance in result.instances] == [6]
            assert (result.task, result.canvases, result.truncated) == ("segmentation", None, False)


@both
@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [1, 2, 3]},
        {"bbox": [1, 2, 3, "4"]},
        {"bbox": 1},
        {"area": "large"},
        {"area": float("inf")},
        {"area": float("nan")},
        {"score": None},
        {"category_id": []},
    ],
)
def test_an_instance_that_is_none_is_refused(segment: Segment, change: dict[str, Any]) -> None:
    wrong = answer(found({**INSTANCE, **change}))
    with (
        FakeServer(stream(line(result=wrong))) as server,
        pytest.raises(UnexpectedAnswer, match="not an answer of solo-serve"),
    ):
        segment(server.url)


@both
@pytest.mark.parametrize("size", [0, 1, len(JSON_BODY) - 1])
def test_a_plain_answer_that_was_cut_is_asked_for_again(segment: Segment, size: int) -> None:
    with FakeServer([PLAIN[0], JSON_BODY[:size]], PLAIN) as server:
        assert segment(server.url).instances


@both
@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\ncontent-ty", b"SSH-2.0-server\r\n"])
def test_a_connection_that_ends_before_an_answer_is_opened_again(
    segment: Segment, start: bytes
) -> None:
    with FakeServer([start], [start], PLAIN) as server:
        assert segment(server.url).instances
        assert server.connections == 3
    with FakeServer(*[[start]] * 3) as server, pytest.raises(ConnectionFailed, match=server.url):
        segment(server.url)


@both
def test_progress_that_a_proxy_collected_says_the_same(segment: Segment) -> None:
    seen: list[Progress] = []
    lines = [ADMITTED, progress(1, 3, 10.0), progress(2, 3, 20.0)]
    with FakeServer(stream(0.5, b"".join([*lines, RESULT]))) as server:
        assert segment(server.url, on_progress=seen.append).instances
    assert [(p.done, p.elapsed_s, p.remaining_s) for p in seen] == [
        (0, 0.0, None),
        (1, 10.0, 20.0),
        (2, 20.0, 10.0),
    ]


@both
def test_a_time_out_names_its_bound_and_a_proxy_that_collects(segment: Segment) -> None:
    with (
        FakeServer([5.0]) as server,
        pytest.raises(TimedOut, match=r"timeout_s=0\.2; a proxy that collects the answer"),
    ):
        segment(server.url, timeout_s=0.2)
    with FakeServer([0.3, *PLAIN]) as server:
        assert segment(server.url, timeout_s=None).instances


@both
def test_an_answer_without_end_is_refused(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("solo_client.answer._MAX_ANSWER_BYTES", 10_000)
    with (
        FakeServer(stream(*[b"x" * 1000] * 11, 5.0)) as server,
        pytest.raises(UnexpectedAnswer, match=r"it is too long\): 'xxx"),
    ):
        segment(server.url)


@both
def test_a_slow_server_that_reports_does_not_time_out(segment: Segment) -> None:
    beats: list[Part] = [part for n in range(5) for part in (progress(0, 3, n * 0.4), 0.4)]
    with FakeServer(stream(*beats, RESULT)) as server:
        started_s = time.monotonic()
        assert segment(server.url, timeout_s=1.5).instances
    assert time.monotonic() - started_s > 1.9


@both
@pytest.mark.parametrize("step", [stream(ADMITTED, 5.0), [5.0]])
def test_a_silent_server_times_out_and_is_not_asked_again(
    segment: Segment, step: list[Part]
) -> None:
    with FakeServer(step) as server:
        with pytest.raises(TimedOut, match=server.url):
            segment(server.url, timeout_s=0.2)
        assert server.left.wait(5)


@both
@pytest.mark.parametrize(
    "cut",
    [
        stream(ADMITTED, whole=False),
        stream(ADMITTED),
        stream(ADMITTED, RESULT[:40]),
        stream(),
    ],
)
def test_a_stream_without_its_last_line_is_a_broken_connection(
    segment: Segment, cut: list[Part]
) -> None:
    with FakeServer(cut, stream(ADMITTED, RESULT)) as server:
        assert segment(server.url).instances
    with FakeServer(cut, cut, cut) as server, pytest.raises(ConnectionFailed, match=server.url):
        segment(server.url)


@both
def test_the_last_line_needs_no_newline(segment: Segment) -> None:
    with FakeServer(stream(ADMITTED, RESULT.strip())) as server:
        assert segment(server.url).instances


@both
@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (504, "deadline_exceeded", ServerFailed),
        (500, "internal_error", ServerFailed),
        (404, "unknown_version", RequestRefused),
        (422, "corrupt_image", ImageFailed),
    ],
)
def test_an_error_line_is_what_its_status_would_be(
    segment: Segment, status: int, code: str, kind: type[SoloError]
) -> None:
    with (
        FakeServer(stream(ADMITTED, refuse(status, code))) as server,
        pytest.raises(kind, match=f"{code}: why") as caught,
    ):
        segment(server.url)
    error = caught.value.__cause__ if kind is ImageFailed else caught.value
    assert type(caught.value) is kind
    assert (error.status, error.code, error.request_id) == (status, code, "r7")  # type: ignore[union-attr]


@both
def test_a_busy_error_line_is_retried(segment: Segment) -> None:
    busy = stream(ADMITTED, refuse(503, "engine_restarting"))
    with FakeServer(busy, stream(ADMITTED, RESULT)) as server:
        assert segment(server.url).instances
    with FakeServer(busy, busy, busy) as server, pytest.raises(Busy) as caught:
        segment(server.url)
    assert (caught.value.status, caught.value.retry_after_s) == (503, 0)
    later = stream(refuse(503, "engine_restarting", retry_after_s=2))
    with FakeServer(later) as server, pytest.raises(Busy) as caught:
        segment(server.url, retry=Retry(max_wait_s=1))
    assert caught.value.retry_after_s == 2


@both
@pytest.mark.parametrize(
    "garbage",
    [
        b"<html>\n",
        b"7\n",
        b"[]\n",
        b'"result"\n',
        b'["result"]\n',
        b"{}\n",
        b'{"detail": 3}\n',
        b'{"progress": 3}\n',
        b'{"progress": {"canvases": 3, "elapsed_s": 1}}\n',
        b'{"progress": {"canvases": 3, "canvases_done": "many", "elapsed_s": 1}}\n',
        b'{"error": "no", "status": 503}\n',
        b'{"error": {"code": "c", "message": "m"}, "status": 1e999}\n',
        b'{"progress": {"canvases": 1e999, "canvases_done": 1, "elapsed_s": 1}}\n',
        b'{"error": {"code": "c", "message": "m"}}\n',
        b'{"result": null}\n',
        b"\xff\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_line_that_is_not_ours_ends_the_request(segment: Segment, garbage: bytes) -> None:
    with (
        FakeServer(stream(ADMITTED, garbage)) as server,
        pytest.raises(UnexpectedAnswer, match="not an answer of solo-serve"),
    ):
        segment(server.url)


@both
def test_an_error_of_the_callback_ends_the_request(segment: Segment) -> None:
    def stop(progress: Progress) -> None:
        raise ValueError("enough")

    with FakeServer(stream(ADMITTED, 5.0)) as server:
        with pytest.raises(ValueError, match="enough"):
            segment(server.url, on_progress=stop)
        assert server.left.wait(5)


async def test_a_cancelled_call_closes_its_connection() -> None:
    admitted = asyncio.Event()
    with FakeServer(stream(ADMITTED, 5.0)) as server:
        async with AsyncClient(server.url) as client:
            call = client.segment(b"file", on_progress=lambda progress: admitted.set())
            task = asyncio.create_task(call)
            await admitted.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.left.wait, 5)


@both
def test_a_refusal_before_admission_is_an_answer_with_its_status(segment: Segment) -> None:
    body = b'{"error": {"code": "overloaded", "message": "full"}}'
    head = b"HTTP/1.1 503 Busy\r\ncontent-type: application/json\r\nretry-after: 0\r\n"
    full: list[Part] = [head + b"content-length: %d\r\n\r\n" % len(body) + body]
    with FakeServer(full, stream(ADMITTED, RESULT)) as server:
        assert segment(server.url).instances


def test_waiting_for_a_connection_of_the_own_pool_is_not_server_time() -> None:
    step = stream(ADMITTED, 0.5, RESULT)
    transport = httpx.HTTPTransport(verify=TLS, limits=httpx.Limits(max_connections=1))
    with FakeServer(*[step] * 5) as server, ThreadPoolExecutor(5) as pool:
        with Client(server.url, timeout_s=1.5, transport=transport) as client:
            results = [pool.submit(client.segment, b"file") for _ in range(5)]
            assert all(result.result().instances for result in results)
        assert server.connections == 1  # which a complete answer leaves open


async def test_waiting_in_the_pool_of_the_async_client_is_not_server_time() -> None:
    step = stream(ADMITTED, 0.5, RESULT)
    transport = httpx.AsyncHTTPTransport(verify=TLS, limits=httpx.Limits(max_connections=1))
    with FakeServer(*[step] * 5) as server:
        async with AsyncClient(server.url, timeout_s=1.5, transport=transport) as client:
            results = await asyncio.gather(*(client.segment(b"file") for _ in range(5)))
        assert all(result.instances for result in results)
        assert server.connections == 1


def test_a_retry_reports_its_progress_from_the_start() -> None:
    seen: list[Progress] = []
    cut = stream(ADMITTED, progress(2, 3, 8.0), whole=False)
    whole = stream(ADMITTED, progress(1, 3, 1.0), RESULT)
    with FakeServer(cut, whole) as server:
        segment_sync(server.url, on_progress=seen.append)
    assert [(p.done, p.remaining_s) for p in seen] == [(0, None), (2, 4.0), (0, None), (1, 2.0)]


def parse(data: bytes, size: int) -> tuple[Any, list[Progress]]:
    """A streamed body that comes in chunks of some size."""
    seen: list[Progress] = []
    headers = {"content-type": "application/x-ndjson; charset=utf-8"}
    request = httpx.Request("POST", "http://test/segment")
    parser = AnswerParser(httpx.Response(200, headers=headers, request=request), seen.append)
    for start in range(0, len(data), size):
        parser.feed(data[start : start + size])
    return parser.finish(), seen


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
def test_lines_may_be_cut_anywhere(size: int) -> None:
    data = ADMITTED + b"\n" + progress(1, 3, 2.0) + b" \r\n" + RESULT
    content, seen = parse(data, size)
    assert content == json.loads(RESULT)["result"]
    assert [p.done for p in seen] == [0, 1]


def test_a_long_line_is_joined_once() -> None:
    """In linear time: 64 MB in chunks of 16 KB."""
    text = "x" * 2**26
    started_s = time.process_time()
    content, _ = parse(line(result=text), 2**14)
    assert content == text
    assert time.process_time() - started_s < 5
