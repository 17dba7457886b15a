"""The unmodified tritonclient.grpc against fronts on Ray."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http

from service.http.keys import add_key
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.processes import free_port
from tests.support.ray_nodes import skip_without_ray
from tests.support.server import ServerProcess, run_server
from tests.support.waiting import poll_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FILE = encode_picture(draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}))
MAX_BODY_BYTES = 1_000_000
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]
"""Each channel is a connection of its own."""


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return file, add_key(file, "shop")


@pytest.fixture(scope="module")
def server(
    port: int, key: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    skip_without_ray()
    folder = tmp_path_factory.mktemp("ray")
    publish(folder / "repo")
    flags = ("--model-repo", f"{folder / 'repo'}", "--fronts", "2", "--grpc-port", f"{port}")
    limits = ("--max-body-bytes", f"{MAX_BODY_BYTES}", "--keys-file", f"{key[0]}")
    with run_server(folder / "log", *flags, *limits, on_ray=True) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess, port: int) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as opened:
        yield opened


@pytest.fixture
def headers(key: tuple[Path, str]) -> dict[str, str]:
    return {"x-api-key": key[1]}


def build_input(file: bytes, module: Any = triton) -> Any:
    tensor = module.InferInput("image", [1], "BYTES")
    return tensor.set_data_from_numpy(np.array([file, None], np.object_)[:-1])


def test_the_answer_is_that_of_http(
    client: Any, server: ServerProcess, headers: dict[str, str]
) -> None:
    assert client.is_server_ready()
    over_grpc = client.infer("blobs", [build_input(FILE)], headers=headers)
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as other:
        over_http = other.infer("blobs", [build_input(FILE, triton_http)], headers=headers)
    for name in ("scores", "category_ids", "bbox", "rle"):
        found = [result.as_numpy(name).tolist() for result in (over_grpc, over_http)]
        assert found[0] == found[1] != []


def test_keys_and_limits_are_those_of_http(client: Any, headers: dict[str, str]) -> None:
    with pytest.raises(triton.InferenceServerException) as refused:
        client.infer("blobs", [build_input(FILE)])
    assert refused.value.status() == "StatusCode.UNAUTHENTICATED"
    large = build_input(bytes(MAX_BODY_BYTES))
    with pytest.raises(triton.InferenceServerException) as refused:
        client.infer("blobs", [large], headers=headers)
    assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    with pytest.raises(triton.InferenceServerException, match=r"(?i)deadline") as refused:
        client.infer("blobs", [build_input(FILE)], headers=headers, client_timeout=1e-3)
    assert refused.value.status() == "StatusCode.DEADLINE_EXCEEDED"


def test_a_stream_answers_in_order(client: Any, headers: dict[str, str]) -> None:
    answers: list[tuple[Any, Any]] = []
    done = threading.Event()

    def take(result: Any, error: Any) -> None:
        answers.append((result, error))
        if len(answers) == 5:
            done.set()

    client.start_stream(callback=take, headers=headers)
    for index in range(5):
        client.async_stream_infer("blobs", [build_input(FILE)], request_id=f"{index}")
    assert done.wait(60)
    client.stop_stream()
    assert [error for _, error in answers] == [None] * 5
    assert [result.get_response().id for result, _ in answers] == ["0", "1", "2", "3", "4"]


def test_fronts_share_the_port_and_the_statistics(
    server: ServerProcess, port: int, headers: dict[str, str]
) -> None:
    infer = "/inference.GRPCInferenceService/ModelInfer"
    sent = triton.service_pb2.ModelInferRequest(model_name="blobs")
    sent.inputs.add(name="image", datatype="BYTES", shape=[1])
    sent.raw_input_contents.append(len(FILE).to_bytes(4, "little") + FILE)
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        (before,) = client.get_inference_statistics("blobs", headers=headers).model_stats
        for _ in range(16):
            with grpc.insecure_channel(f"127.0.0.1:{port}", OPTIONS) as channel:
                call = channel.unary_unary(infer)
                call(sent.SerializeToString(), metadata=tuple(headers.items()), timeout=60)
        (after,) = client.get_inference_statistics("blobs", "1", headers=headers).model_stats
    assert after.inference_count == before.inference_count + 16
    text = httpx.get(f"{server.url}/metrics", headers=headers).text
    lines = [line for line in text.splitlines() if line.startswith("solo_requests_total{")]
    fronts = {
        line.partition('replica="')[2].partition('"')[0]
        for line in lines
        if f'route="{infer}"' in line and not line.endswith(" 0.0")
    }
    assert len(fronts) == 2


def test_the_end_finishes_what_was_accepted(
    server: ServerProcess, client: Any, headers: dict[str, str]
) -> None:
    errors: list[Any] = []

    def take(result: Any, error: Any) -> None:
        errors.append(error)

    for _ in range(20):
        client.async_infer("blobs", [build_input(FILE)], take, headers=headers)
    wait = partial(poll_until, timeout_s=60, pause_s=0.01)
    wait(lambda: errors != [])
    server.terminate()
    assert server.wait(120) == 0, server.read_log()
    wait(lambda: len(errors) == 20)
    # What had not arrived when the drain began is refused, not lost.
    failed = {error.status() for error in errors if error is not None}
    assert failed <= {"StatusCode.UNAVAILABLE"}
