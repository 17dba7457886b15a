"""The real server as a process, spoken to over real sockets."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from pycocotools import mask as coco_mask

from service.engines.driver import Gpu, find_gpu
from service.models.publishing import write_default
from service.predict import main as predict_main
from tests.support.blob_model import (
    KEEP_RATIO_INPUT,
    draw_picture,
    encode_picture,
    poisoned_picture,
    publish,
)
from tests.support.pictures import build_gif, build_png_header, build_truncated_jpeg
from tests.support.server import ServerProcess, run_server

PICTURE = encode_picture(draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}))
FLAGS = ("--device", "cpu", "--threads", "1", "--pool-threads", "2")


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repo")
    publish(root)
    publish(root, "wide", poisonable=True, input=KEEP_RATIO_INPUT)
    write_default(root, "blobs")
    return root


@pytest.fixture(scope="module")
def server(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with run_server(log, "--model-repo", str(repo), *FLAGS) as running:
        yield running


def segment(url: str, data: bytes = PICTURE, **params: str) -> httpx.Response:
    return httpx.post(
        f"{url}/segment", params=params, files=[("images", ("a.png", data))], timeout=60
    )


def read_metric(url: str, name: str) -> float:
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def test_images_are_segmented_and_counted(server: ServerProcess) -> None:
    images = 'solo_images_total{model="blobs",version="1"}'
    total = 'solo_stage_duration_seconds_sum{model="blobs",stage="%s",version="1"}'
    stages = ("decode", "queue", "infer", "postprocess", "encode")
    before = read_metric(server.url, images)
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _: segment(server.url), range(40)))
    for response in responses:
        assert response.status_code == 200
        red, blue = response.json()["results"][0]["instances"]
        assert (red["category"], red["bbox"], red["area"]) == ("red", [4, 8, 12, 16], 192)
        assert coco_mask.decode(blue["segmentation"])[30:40, 30:40].all()
    assert read_metric(server.url, images) - before == 40
    together = sum(read_metric(server.url, total % stage) for stage in stages)
    assert 0.5 < together / read_metric(server.url, total % "total") <= 1.001
    assert read_metric(server.url, "solo_queue_images") == 0
    assert read_metric(server.url, "solo_in_flight_requests") == 0


def test_a_batch_does_not_change_a_result(server: ServerProcess) -> None:
    sizes = [(48, 48), (48, 90), (90, 48), (64, 64), (30, 100), (100, 100)]
    pictures = [encode_picture(draw_picture(h, w)) for h, w in sizes] * 3
    alone = [segment(server.url, p, model="wide").json()["results"][0] for p in pictures]
    with ThreadPoolExecutor(len(pictures)) as pool:
        together = list(pool.map(lambda p: segment(server.url, p, model="wide").json(), pictures))
    for one, other in zip(alone, together, strict=True):
        (a,), (b,) = one["instances"], other["results"][0]["instances"]
        assert coco_mask.iou([a["segmentation"]], [b["segmentation"]], [0])[0, 0] >= 0.999
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "data", "status", "code"),
    [
        ("text", b"hello", 415, "unsupported_format"),
        ("truncated jpeg", build_truncated_jpeg(), 422, "corrupt_image"),
        ("60000x60000 png", build_png_header(60_000, 60_000), 413, "image_too_large"),
        ("gif", build_gif(), 415, "unsupported_format"),
        ("100 MB", bytes(100_000_000), 413, "body_too_large"),
    ],
)
def test_bad_images_are_refused_and_the_server_goes_on(
    server: ServerProcess, name: str, data: bytes, status: int, code: str
) -> None:
    response = httpx.post(f"{server.url}/segment", content=data, timeout=60)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert segment(server.url).status_code == 200


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/segment", 400, "empty_body"),
        ("/segment?model=cats", 404, "unknown_model"),
        ("/segment?score_threshold=2", 422, "invalid_parameter"),
    ],
)
def test_bad_requests_are_refused(server: ServerProcess, path: str, status: int, code: str) -> None:
    response = httpx.post(server.url + path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_a_chunked_body_is_cut_at_the_limit(server: ServerProcess) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1_000_000
            yield bytes(1_000_000)

    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            b"POST /segment HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        answer = threading.Event()

        def send() -> None:
            try:
                for chunk in body():
                    if answer.is_set():
                        return
                    connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            except OSError:
                pass

        sender = threading.Thread(target=send)
        sender.start()
        received = connection.recv(65536)
        answer.set()
        sender.join()
    assert received.startswith(b"HTTP/1.1 413 ")
    assert sent < 1_000_000_000
    assert segment(server.url).status_code == 200


def test_an_engine_failure_harms_only_its_image(server: ServerProcess) -> None:
    files = [("images", PICTURE), ("images", encode_picture(poisoned_picture()))]
    response = httpx.post(f"{server.url}/segment?model=wide", files=files)
    good, bad = response.json()["results"]
    assert len(good["instances"]) == 2
    assert bad["error"]["code"] == "engine_error"
    assert segment(server.url, model="wide").status_code == 200


def test_predict_agrees_with_the_server(server: ServerProcess, repo: Path, tmp_path: Path) -> None:
    for index in range(5):
        boxes = {"red": (4, 8, 12 + index, 16), "green": (30, 2 + index, 10, 20)}
        (tmp_path / f"{index}.png").write_bytes(encode_picture(draw_picture(90, 70, boxes)))
    inputs = [str(tmp_path / "*.png"), "--quiet"]
    predict_main([*inputs, "--url", server.url, "--out", str(tmp_path / "remote.json")])
    local = ["--model-repo", str(repo), "--device", "cpu", "--out", str(tmp_path / "local.json")]
    predict_main([*inputs, *local])
    remote = json.loads((tmp_path / "remote.json").read_bytes())
    assert len(remote) == 10
    assert remote == json.loads((tmp_path / "local.json").read_bytes())


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_0(repo: Path, tmp_path: Path, stop: signal.Signals) -> None:
    """Accepted work waits 1 s for a fuller batch, so the signal arrives while it is in work."""
    flags = ("--model-repo", str(repo), *FLAGS, "--max-delay-ms", "1000")
    with run_server(tmp_path / "log", *flags) as server, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(segment, server.url) for _ in range(4)]
        while read_metric(server.url, "solo_queue_images") < 4:
            pass
        server.process.send_signal(stop)
        while httpx.get(f"{server.url}/v2/health/ready").status_code != 503:
            pass
        assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
        late = segment(server.url)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert server.wait() == 0


def test_a_server_that_cannot_start_says_why(repo: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "repo"
    file = publish(damaged, "nuclei") / "1" / "model.onnx"
    file.write_bytes(file.read_bytes()[:100])
    for name, (flags, reason) in {
        "damaged": (["--model-repo", str(damaged)], "nuclei/1/model.onnx: has 100 bytes"),
        "missing": (["--model-repo", str(tmp_path / "no")], "no' is not a folder"),
        "setting": (["--max-batch", "0"], "--max-batch: Input should be greater than 0, not '0'"),
        "default": (
            ["--model-repo", str(repo), "--default-model", "cats"],
            "there is no default model 'cats'",
        ),
    }.items():
        server = ServerProcess(tmp_path / name, *flags)
        assert server.wait() == 1, name
        assert reason in server.read_log(), name
        assert "Traceback" not in server.read_log(), name


@pytest.mark.skipif(isinstance(find_gpu(), Gpu), reason="this machine has a GPU")
def test_cuda_where_there_is_none_exits_with_the_reason(repo: Path, tmp_path: Path) -> None:
    environment = {"SOLO_DEVICE": "cuda", "SOLO_MODEL_REPO": str(repo)}
    server = ServerProcess(tmp_path / "log", environment=environment)
    assert server.wait(30) == 1
    assert f"solo-serve: error: device cuda: {find_gpu()}" in server.read_log()


def test_a_precision_that_a_model_lacks_is_replaced_and_said(repo: Path, tmp_path: Path) -> None:
    flags = ("--model-repo", str(repo), "--precision", "int8", *FLAGS)
    with run_server(tmp_path / "log", *flags) as server:
        assert segment(server.url).status_code == 200
        assert "model blobs version 1 is served in fp32, not in int8" in server.read_log()
        assert httpx.get(f"{server.url}/v2/models/blobs").json()["precision"] == "fp32"


def test_a_server_that_watches_starts_without_models_and_takes_the_first(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    root.mkdir()
    server = ServerProcess(tmp_path / "alone", "--model-repo", str(root), *FLAGS)
    assert server.wait() == 1
    assert "has no model folders" in server.read_log()
    watching = ServerProcess(
        tmp_path / "log", "--model-repo", str(root), "--model-poll-s", "0.1", *FLAGS
    )
    try:
        deadline_s = time.monotonic() + 60
        while "running on" not in watching.read_log():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        publish(root)
        watching.wait_until_ready()
        assert segment(watching.url).json()["model"] == "blobs"
    finally:
        watching.process.kill()
        watching.wait()
