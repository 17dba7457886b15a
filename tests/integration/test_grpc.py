"""The unmodified tritonclient.grpc, and clients that mean harm, against the real server."""

from __future__ import annotations

import asyncio
import queue
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
from grpc import aio

from service.grpc.messages import MESSAGES
from service.http.keys import add_key
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.model_folder import add_version, edit_config
from tests.support.server import CPU_FLAGS, ServerProcess, run_server
from tests.support.slow_model import build_slow_graph, publish_graph
from tests.support.waiting import poll_until, wait_until

BOXES = {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}
PIXELS = draw_picture(48, 64, BOXES)
FILE = encode_picture(PIXELS)
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"
MAX_BODY_BYTES = 1_000_000
CONNECTIONS = 12


def port_of(server: ServerProcess) -> str:
    found = re.search(r"gRPC on (\S+)", server.read_log())
    assert found
    return found[1]


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repo")
    publish(root)
    return root


@pytest.fixture(scope="module")
def server(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = (*CPU_FLAGS, "--grpc-port", "0", "--max-body-bytes", str(MAX_BODY_BYTES))
    limits = ("--max-connections", str(CONNECTIONS), "--body-timeout-s", "2")
    memory = ("--max-bodies-bytes", str(MAX_BODY_BYTES))
    with run_server(log, "--model-repo", str(repo), *flags, *limits, *memory) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Any]:
    with triton.InferenceServerClient(port_of(server)) as opened:
        yield opened


def files_input(*files: bytes, module: Any = triton) -> Any:
    tensor = module.InferInput("image", [len(files)], "BYTES")
    return tensor.set_data_from_numpy(np.array([*files, None], np.object_)[:-1])


def pixels_input() -> Any:
    return triton.InferInput("image", list(PIXELS.shape), "UINT8").set_data_from_numpy(PIXELS)


def build_request(*files: bytes, **fields: Any) -> bytes:
    sent = triton.service_pb2.ModelInferRequest(model_name="blobs", **fields)
    sent.inputs.add(name="image", datatype="BYTES", shape=[len(files)])
    sent.raw_input_contents.append(
        b"".join(len(file).to_bytes(4, "little") + file for file in files)
    )
    return bytes(sent.SerializeToString())


REQUEST = build_request(FILE)


def arrays_of(result: Any) -> dict[str, Any]:
    names = ("scores", "category_ids", "bbox", "rle", "image_index", "image_hw", "error")
    return {name: result.as_numpy(name).tolist() for name in names}


@pytest.mark.parametrize("tensor", [files_input(FILE), pixels_input()], ids=["file", "pixels"])
def test_the_answer_is_that_of_http(client: Any, server: ServerProcess, tensor: Any) -> None:
    over_grpc = client.infer("blobs", [tensor], request_id="r7")
    assert over_grpc.get_response().id == "r7"
    assert over_grpc.get_response().model_version == "1"
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as other:
        over_http = other.infer("blobs", [files_input(FILE, module=triton_http)])
    arrays = arrays_of(over_grpc)
    assert arrays == arrays_of(over_http)
    assert arrays["category_ids"] == [10, 30]
    assert over_grpc.as_numpy("bbox").shape == (2, 4)


def test_chosen_outputs_parameters_and_several_images(client: Any) -> None:
    outputs = [triton.InferRequestedOutput(name) for name in ("error", "scores", "image_index")]
    result = client.infer(
        "blobs",
        [files_input(FILE, b"no image", FILE)],
        model_version="1",
        outputs=outputs,
        priority=2,
        timeout=60_000_000,
        parameters={"max_instances": 1, "score_threshold": 0.2},
    )
    assert [output.name for output in result.get_response().outputs] == [
        *("error", "scores", "image_index")
    ]
    assert result.as_numpy("image_index").tolist() == [0, 2]
    assert result.as_numpy("error")[1].startswith(b"unsupported_format")
    nothing = client.infer("blobs", [files_input(FILE)], parameters={"score_threshold": 1.0})
    assert nothing.as_numpy("bbox").shape == (0, 4)


def test_health_metadata_statistics_and_the_repository(client: Any, server: ServerProcess) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("blobs", "1")
    assert client.get_server_metadata().name == "solo-serve"
    metadata = client.get_model_metadata("blobs")
    assert (metadata.versions, metadata.inputs[0].datatype) == (["1"], "BYTES")
    config = client.get_model_config("blobs").config
    assert (config.input[0].data_type, list(config.version_policy.specific.versions)) == (13, [1])
    client.infer("blobs", [files_input(FILE)])
    (stats,) = client.get_inference_statistics("blobs", "1").model_stats
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as other:
        (same,) = other.get_inference_statistics()["model_stats"]
        assert other.get_model_config("blobs")["input"][0]["data_type"] == "TYPE_STRING"
    assert stats.inference_count == same["inference_count"] > 0
    assert stats.inference_stats.success.ns == same["inference_stats"]["success"]["ns"] > 0
    (entry,) = client.get_model_repository_index().models
    assert (entry.name, entry.version, entry.state) == ("blobs", "1", "READY")


@pytest.mark.parametrize(
    ("ask", "status", "text"),
    [
        (lambda c: c.infer("cats", [files_input(FILE)]), "NOT_FOUND", "there is no model 'cats'"),
        (lambda c: c.is_model_ready("blobs", "9"), "NOT_FOUND", "in version 1, not 9"),
        (lambda c: c.is_model_ready("blobs", "x"), "NOT_FOUND", "a version is a number"),
        (lambda c: c.infer("blobs", [files_input(b"x")]), "INVALID_ARGUMENT", "image 0: .*not an"),
        (lambda c: c.infer("blobs", [files_input(FILE)] * 2), "INVALID_ARGUMENT", "inputs"),
        (
            lambda c: c.infer("blobs", [files_input(FILE)], timeout=1),
            *("DEADLINE_EXCEEDED", "not done within 1 ms"),
        ),
        (
            lambda c: c.infer("blobs", [files_input(FILE)], client_timeout=1e-4),
            *("DEADLINE_EXCEEDED", ""),
        ),
        (lambda c: c.load_model("blobs"), "PERMISSION_DENIED", "model control is off"),
        (lambda c: c.get_trace_settings(), "UNIMPLEMENTED", "SOLO_OTLP_ENDPOINT"),
        (lambda c: c.get_log_settings(), "UNIMPLEMENTED", "SOLO_LOG_LEVEL"),
        (lambda c: c.get_cuda_shared_memory_status(), "UNIMPLEMENTED", "not supported"),
        (
            lambda c: c.infer("blobs", [files_input(FILE)], compression_algorithm="gzip"),
            *("UNIMPLEMENTED", "gzip"),
        ),
        (
            lambda c: c.infer("blobs", [files_input(bytes(2 * MAX_BODY_BYTES))]),
            *("RESOURCE_EXHAUSTED", f"larger than max .* vs. {MAX_BODY_BYTES}"),
        ),
    ],
)
def test_errors_have_a_status_and_the_text_of_http(
    client: Any, ask: Any, status: str, text: str
) -> None:
    with pytest.raises(triton.InferenceServerException, match=text) as caught:
        ask(client)
    assert caught.value.status() == f"StatusCode.{status}"
    assert client.is_server_live()


def test_an_error_says_its_code_and_its_request(server: ServerProcess) -> None:
    with grpc.insecure_channel(port_of(server)) as channel:
        call = channel.unary_unary(INFER)
        metadata = (("x-request-id", "from-here"),)
        with pytest.raises(grpc.RpcError) as caught:
            call(build_request(FILE, id="a", model_version="9"), metadata=metadata)
    assert dict(caught.value.trailing_metadata()) == {
        "x-request-id": "from-here",
        "solo-error-code": "unknown_version",
    }
    assert f"POST {INFER} 404" in server.read_log()
    assert "id=from-here" in server.read_log()


def test_a_stream_answers_in_order_and_outlives_errors(client: Any) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    sent = [FILE, b"no image", FILE] * 12
    for index, file in enumerate(sent):
        client.async_stream_infer(
            *("blobs", [files_input(file)]),
            request_id=str(index),
            enable_empty_final_response=index == 0,
        )
    for index, file in enumerate(sent):
        result, error = answers.get(timeout=60)
        if file is FILE:
            assert error is None
            response = result.get_response()
            assert response.id == str(index)
            assert result.as_numpy("category_ids").tolist() == [10, 30]
            assert ("triton_final_response" in response.parameters) == (index == 0)
        else:
            assert "image 0: " in str(error)
    client.stop_stream()


async def test_many_at_once_from_one_event_loop(server: ServerProcess) -> None:
    async with triton_aio.InferenceServerClient(port_of(server)) as client:
        asked = [client.infer("blobs", [files_input(FILE)], request_id=str(i)) for i in range(5)]
        results = await asyncio.gather(*asked)
    assert [result.get_response().id for result in results] == [*map(str, range(5))]
    assert all(result.as_numpy("category_ids").tolist() == [10, 30] for result in results)


def test_requests_are_counted_like_those_of_http(client: Any, server: ServerProcess) -> None:
    def count(status: int) -> float:
        text = httpx.get(f"{server.url}/metrics").text
        labels = f'method="POST",route="{INFER}",status="{status}"'
        found = re.search(f"solo_requests_total{{{re.escape(labels)}}} (.+)", text)
        return float(found[1]) if found else 0.0

    before = count(200), count(404)
    client.infer("blobs", [files_input(FILE)])
    with pytest.raises(triton.InferenceServerException):
        client.infer("cats", [files_input(FILE)])
    assert (count(200), count(404)) == (before[0] + 1, before[1] + 1)


async def ask(channel: Any, path: str, message: bytes, **options: Any) -> str:
    """OK, or the name of the status."""
    try:
        await channel.unary_unary(path)(message, timeout=30, **options)
    except aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (b"", "INVALID_ARGUMENT"),
        (b"\xff" * 100, "INVALID_ARGUMENT"),
        (REQUEST[:-20], "INVALID_ARGUMENT"),
        (b"\x2a\x00" * 400_000, "INVALID_ARGUMENT"),
        (b"\x3a\x00" * 400_000, "INVALID_ARGUMENT"),
        (build_request(FILE, id="i" * 500_000), "RESOURCE_EXHAUSTED"),
        (triton.service_pb2.ModelInferRequest(model_name="m" * 9000).SerializeToString(), None),
        (bytes(MAX_BODY_BYTES + 1), "RESOURCE_EXHAUSTED"),
    ],
    ids=["empty", "noise", "cut", "inputs", "raw", "id", "name", "large"],
)
async def test_hostile_messages_are_refused(
    server: ServerProcess, message: bytes, status: str | None
) -> None:
    async with aio.insecure_channel(port_of(server)) as channel:
        assert await ask(channel, INFER, message) == (status or "INVALID_ARGUMENT")
        assert await ask(channel, INFER, REQUEST) == "OK"


async def test_small_calls_take_no_large_messages_and_unknown_ones_are_refused(
    server: ServerProcess,
) -> None:
    async with aio.insecure_channel(port_of(server)) as channel:
        live = "/inference.GRPCInferenceService/ServerLive"
        assert await ask(channel, live, bytes(500_000)) == "RESOURCE_EXHAUSTED"
        assert await ask(channel, "/inference.GRPCInferenceService/Nope", b"") == "UNIMPLEMENTED"
        assert await ask(channel, "/other.Service/Call", b"") == "UNIMPLEMENTED"
        large = (("a", "b" * 30_000),)
        assert await ask(channel, INFER, REQUEST, metadata=large) == "RESOURCE_EXHAUSTED"


async def test_calls_that_send_nothing_leave_room_and_end(server: ServerProcess) -> None:
    async with aio.insecure_channel(port_of(server)) as channel:
        silent = [channel.stream_unary(INFER)() for _ in range(3 * CONNECTIONS)]
        began_s = time.monotonic()
        assert await ask(channel, CHECK, b"") == "OK"
        ended = {(await call.code()).name for call in silent if call.done()}
        assert ended <= {"UNAVAILABLE"}  # so the check has not waited for any of them
        statuses = [(await call.code()).name for call in silent]
        assert time.monotonic() - began_s < 25
        # Half of the places at once; the others are refused, not queued.
        assert statuses.count("DEADLINE_EXCEEDED") == CONNECTIONS // 2
        assert statuses.count("UNAVAILABLE") == 3 * CONNECTIONS - CONNECTIONS // 2
        assert await ask(channel, INFER, REQUEST) == "OK"
        assert await ask(channel, CHECK, b"") == "OK"


async def test_idle_streams_leave_room(server: ServerProcess) -> None:
    async with aio.insecure_channel(port_of(server)) as channel:
        streams = [channel.stream_stream(STREAM)() for _ in range(20)]
        await wait_until(lambda: sum(stream.done() for stream in streams) >= 18)
        refused = [stream for stream in streams if stream.done()]
        assert {(await stream.code()).name for stream in refused} == {"UNAVAILABLE"}
        left = [stream for stream in streams if not stream.done()]
        assert len(left) == 2  # half of the places
        assert await ask(channel, INFER, REQUEST) == "OK"
        await left[0].write(REQUEST)
        answer = MESSAGES["ModelStreamInferResponse"].FromString(await left[0].read())
        assert answer.infer_response.model_name == "blobs"
        for stream in left:
            stream.cancel()


async def test_connections_are_bounded(server: ServerProcess) -> None:
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [aio.insecure_channel(port_of(server), options) for _ in range(2 * CONNECTIONS)]
    statuses = await asyncio.gather(*(ask(channel, CHECK, b"") for channel in channels))
    assert statuses.count("OK") <= CONNECTIONS
    assert set(statuses) == {"OK", "UNAVAILABLE"}
    for channel in channels:
        await channel.close()


async def test_pings_without_a_call_end_the_connection_and_no_more(server: ServerProcess) -> None:
    options = (
        *(("grpc.keepalive_time_ms", 10), ("grpc.keepalive_permit_without_calls", 1)),
        *(("grpc.http2.max_pings_without_data", 0), ("grpc.use_local_subchannel_pool", 1)),
    )
    async with aio.insecure_channel(port_of(server), options) as flooding:
        await ask(flooding, CHECK, b"")
        await asyncio.sleep(1)
        async with aio.insecure_channel(port_of(server)) as other:
            assert await ask(other, INFER, REQUEST) == "OK"


def test_keys(repo: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key, admin = add_key(file, "shop"), add_key(file, "boss", admin=True)
    flags = (*CPU_FLAGS, "--grpc-port", "0", "--keys-file", str(file), "--model-control", "1")
    with (
        run_server(tmp_path / "log", "--model-repo", str(repo), *flags) as running,
        triton.InferenceServerClient(port_of(running)) as client,
    ):
        sent = [files_input(FILE)]
        for headers in (None, {"x-api-key": "wrong"}, {"authorization": f"Basic {key}"}):
            with pytest.raises(triton.InferenceServerException, match="API key") as caught:
                client.infer("blobs", sent, headers=headers)
            assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
        assert client.infer("blobs", sent, headers={"x-api-key": key})
        assert client.infer("blobs", sent, headers={"authorization": f"Bearer {key}"})
        assert client.is_server_ready()
        with pytest.raises(triton.InferenceServerException, match="not an administrator's"):
            client.load_model("blobs", headers={"x-api-key": key})
        client.load_model("blobs", headers={"x-api-key": admin})
        with pytest.raises(triton.InferenceServerException, match="'config' is not supported"):
            client.load_model("blobs", headers={"x-api-key": admin}, config="{}")
        client.unload_model("blobs", headers={"x-api-key": admin})
        with pytest.raises(triton.InferenceServerException, match="is not served"):
            client.infer("blobs", sent, headers={"x-api-key": key})


@pytest.fixture
def slow_server(tmp_path: Path) -> Iterator[ServerProcess]:
    publish_graph(tmp_path / "repo", "blobs", build_slow_graph(rounds=30_000))
    flags = (*CPU_FLAGS, "--grpc-port", "0")
    with run_server(tmp_path / "log", "--model-repo", str(tmp_path / "repo"), *flags) as running:
        yield running


async def test_what_a_client_gives_up_is_not_worked_on(slow_server: ServerProcess) -> None:
    async with aio.insecure_channel(port_of(slow_server)) as channel:
        call = channel.unary_unary(INFER)(REQUEST)
        queued = "solo_queue_canvases"
        await wait_until(lambda: read_gauge(slow_server, queued) > 0)
        call.cancel()
        await wait_until(lambda: read_gauge(slow_server, queued) == 0)
        assert await ask(channel, INFER, REQUEST, metadata=None) == "OK"
    text = httpx.get(f"{slow_server.url}/metrics").text
    assert 'solo_cancelled_images_total{model="blobs",reason="client_left"} 1.0' in text


def read_gauge(server: ServerProcess, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(rf"^{name} (.+)$", text, re.MULTILINE)
    assert found
    return float(found[1])


async def test_a_drain_finishes_what_runs_and_health_says_so(slow_server: ServerProcess) -> None:
    async with aio.insecure_channel(port_of(slow_server)) as channel:
        watching = channel.unary_stream(WATCH)(b"")
        assert await watching.read() == SERVING
        running = channel.unary_unary(INFER)(REQUEST)
        await wait_until(lambda: read_gauge(slow_server, "solo_queue_canvases") > 0)
        slow_server.terminate()
        assert await watching.read() == NOT_SERVING
        assert await ask(channel, INFER, REQUEST) == "UNAVAILABLE"
        assert await running
    assert await asyncio.to_thread(slow_server.wait) == 0


def test_each_version_has_statistics_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "repo" / "blobs"
    publish(folder.parent)
    add_version(folder, 2)
    edit_config(folder, lambda content: content.update(serve={"policy": "all"}))
    flags = ("--model-repo", str(folder.parent), *CPU_FLAGS, "--grpc-port", "0")
    with run_server(tmp_path / "log", *flags) as running:
        with triton.InferenceServerClient(port_of(running)) as client:
            for version in ("1", "2", "2"):
                client.infer("blobs", [files_input(FILE)], model_version=version)
            found = client.get_inference_statistics("blobs").model_stats
            (second,) = client.get_inference_statistics("blobs", "2").model_stats
        counts = [(stats.name, stats.version, stats.inference_count) for stats in found]
        assert counts == [("blobs", "1", 1), ("blobs", "2", 2)]
        assert (second.inference_count, second.execution_count) == (2, 2)


def test_workers_share_the_port_and_the_statistics(repo: Path, tmp_path: Path) -> None:
    flags: Sequence[str] = (*CPU_FLAGS, "--workers", "2", "--grpc-port", "0")
    with run_server(tmp_path / "log", "--model-repo", str(repo), *flags) as running:
        are_ready = lambda: running.read_log().count("gRPC on ") == 2  # noqa: E731
        poll_until(are_ready, timeout_s=60, pause_s=0.1)
        (address,) = set(re.findall(r"gRPC on (\S+)", running.read_log()))
        for _ in range(8):
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(address, options) as channel:
                channel.unary_unary(INFER)(REQUEST)
        (stats,) = httpx.get(f"{running.url}/v2/models/stats").json()["model_stats"]
        assert stats["inference_count"] == 8
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 0


def test_a_port_that_is_taken_stops_the_start(server: ServerProcess, repo: Path) -> None:
    port = port_of(server).rpartition(":")[2]
    log = repo.parent / "second.log"
    for workers in ("1", "2"):
        flags = (*CPU_FLAGS, "--grpc-port", port, "--workers", workers)
        expected = rf"cannot serve gRPC on 127\.0\.0\.1:{port}"
        with pytest.raises(RuntimeError, match=expected), run_server(log, *flags):
            pass


async def test_a_client_that_leaves_a_full_stream_leaves_nothing(
    slow_server: ServerProcess,
) -> None:
    async with aio.insecure_channel(port_of(slow_server)) as channel:
        stream = channel.stream_stream(STREAM)()
        for _ in range(40):
            await stream.write(REQUEST)
        await wait_until(lambda: read_gauge(slow_server, "solo_queue_images") == 16)
        stream.cancel()
        for gauge in ("solo_queue_images", "solo_request_body_bytes", "solo_in_flight_requests"):
            await wait_until(lambda gauge=gauge: read_gauge(slow_server, gauge) == 0)  # type: ignore[misc]
        assert await ask(channel, INFER, REQUEST) == "OK"
