"""solo_client and solo-predict against the real server."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tritonclient.http as triton
from PIL import Image

from service.http.keys import add_key
from service.predict import main as predict_main
from solo_client import (
    AsyncClient,
    Busy,
    Client,
    ConnectionFailed,
    ImageFailed,
    Options,
    RequestRefused,
    Result,
    Retry,
    ServerFailed,
)
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.journals import read_keys
from tests.support.processes import free_port
from tests.support.server import ROOT, ServerProcess, run_server
from tests.support.waiting import poll_until

PIXELS = draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)})
FILE = encode_picture(PIXELS)
FLAGS = ("--device", "cpu", "--threads", "1", "--pool-threads", "1")


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repo")
    publish(root)
    return root


@pytest.fixture(scope="module")
def server(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that holds two images of four canvases of a client, and each for 50 ms."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    busy = ("--max-queue-canvases", "16", "--max-delay-ms", "50")
    with run_server(log, "--model-repo", str(repo), *FLAGS, *busy) as running:
        yield running


def check(result: Result) -> None:
    assert (result.model, result.version, result.width, result.height) == ("blobs", 1, 64, 48)
    red, blue = result.instances
    assert (red.category, blue.category) == ("red", "blue")
    assert red.mask[8:24, 4:16].all()
    assert red.mask.sum() == red.area == 192
    assert result.boxes_xyxy.tolist() == [[4, 8, 16, 24], [30, 30, 40, 40]]
    assert set(result.timing_ms) >= {"decode", "infer", "total"}


def test_every_kind_of_image(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(FILE)
    with Client(server.url) as client:
        assert client.is_ready()
        assert [model["name"] for model in client.list_models()] == ["blobs"]
        for image in (FILE, bytearray(FILE), memoryview(FILE), io.BytesIO(FILE), path, str(path)):
            check(client.segment(image))
        for pixels in (PIXELS, Image.fromarray(PIXELS)):
            check(client.segment(pixels))
        with open(path, "rb") as file:
            assert client.segment(file).file_name == "picture.png"
        path.with_name("empty.png").touch()
        with pytest.raises(ImageFailed, match=r"image 0 \(empty\.png\): empty_body"):
            client.segment(path.with_name("empty.png"))
        assert client.segment(path).file_name == "picture.png"
        assert client.segment(FILE, score_threshold=1.0).instances == ()
        (only,) = client.segment(FILE, max_instances=1, masks=False).instances
        assert only.rle is None


def test_several_images_in_one_request(server: ServerProcess) -> None:
    with Client(server.url) as client:
        good, bad = client.segment_many([FILE, b"no image"])
        assert isinstance(good, Result)
        check(good)
        assert isinstance(bad, ImageFailed)
        assert (bad.index, bad.code) == (1, "unsupported_format")
        with pytest.raises(RequestRefused) as caught:
            client.segment_many([FILE] * 9)
        assert (caught.value.status, caught.value.code) == (413, "too_many_images")


def test_errors_carry_the_servers_code(server: ServerProcess) -> None:
    with Client(server.url) as client:
        cases: list[tuple[Options, str]] = [
            ({"model": "cats"}, "unknown_model"),
            ({"version": 9}, "unknown_version"),
            ({"score_threshold": 2.0}, "invalid_parameter"),
            ({"query": {"colour": 1}}, "invalid_parameter"),
        ]
        for options, code in cases:
            with pytest.raises(RequestRefused) as caught:
                client.segment(FILE, **options)
            assert caught.value.code == code
            assert caught.value.request_id is not None
        with pytest.raises(ImageFailed, match="unsupported_format"):
            client.segment(b"no image")


def test_a_full_server_is_waited_for(server: ServerProcess) -> None:
    """16 threads and a server that holds 2 images: some are refused, in the end all are served."""
    once = Retry(attempts=1)
    with Client(server.url, retry=once) as client, ThreadPoolExecutor(16) as pool:
        refused = [f.exception() for f in [pool.submit(client.segment, FILE) for _ in range(16)]]
    busy = [error for error in refused if isinstance(error, Busy)]
    assert busy
    assert {(error.code, error.retry_after_s) for error in busy} == {("overloaded", 1.0)}
    with Client(server.url, retry=Retry(attempts=30)) as client, ThreadPoolExecutor(16) as pool:
        for result in pool.map(client.segment, [FILE] * 32):
            check(result)


async def test_async_requests_at_once_and_cancelled(server: ServerProcess) -> None:
    async with AsyncClient(server.url, retry=Retry(attempts=30)) as client:
        assert await client.is_ready()
        for result in await asyncio.gather(*(client.segment(PIXELS) for _ in range(6))):
            check(result)
        (good, bad) = await client.segment_many([FILE, b""])
        assert isinstance(good, Result)
        assert isinstance(bad, ImageFailed)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await client.segment(FILE)
        check(await client.segment(FILE))


def test_a_deadline_of_the_request(server: ServerProcess) -> None:
    with Client(server.url) as client:
        with pytest.raises(ServerFailed) as caught:
            client.segment(FILE, query={"timeout_ms": 1})
        assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
        check(client.segment(FILE, query={"timeout_ms": 60_000, "priority": "batch"}))


def test_a_key_lets_in_all_three_clients(repo: Path, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "shop")
    (tmp_path / "key").write_text(f"{key}\n")
    (tmp_path / "a.png").write_bytes(FILE)
    flags = ("--model-repo", str(repo), *FLAGS, "--keys-file", str(tmp_path / "keys.json"))
    predict = [str(tmp_path / "a.png"), "--quiet", "--out", str(tmp_path / "out.json"), "--url"]
    with run_server(tmp_path / "log", *flags) as closed:
        with Client(closed.url) as client, pytest.raises(RequestRefused, match="unauthorized"):
            client.segment(FILE)
        with Client(closed.url, api_key=key) as client:
            check(client.segment(FILE))
        with pytest.raises(SystemExit, match="unauthorized"):
            predict_main([*predict, closed.url])
        predict_main([*predict, closed.url, "--api-key-file", str(tmp_path / "key")])
        assert len(json.loads((tmp_path / "out.json").read_bytes())) == 2
        image = triton.InferInput("image", list(PIXELS.shape), "UINT8")
        image.set_data_from_numpy(PIXELS)
        with triton.InferenceServerClient(closed.url.removeprefix("http://")) as other:
            with pytest.raises(triton.InferenceServerException, match="API key"):
                other.infer("blobs", [image])
            result = other.infer("blobs", [image], headers={"X-API-Key": key})
            assert len(result.as_numpy("scores")) == 2


def test_no_server_is_said() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url, retry=Retry(attempts=2, backoff_s=0.01)) as client:
        assert not client.is_ready()
        with pytest.raises(ConnectionFailed, match=url) as caught:
            client.segment(FILE)
        assert isinstance(caught.value.__cause__, httpx.ConnectError)


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for index in range(count):
        boxes = {"red": (4, 8, 12 + index % 8, 16), "green": (40, 2 + index % 16, 10, 20)}
        (folder / f"{index:02d}.png").write_bytes(encode_picture(draw_picture(90, 70, boxes)))


def test_predict_killed_and_started_again_gives_what_one_run_gives(
    server: ServerProcess, repo: Path, tmp_path: Path
) -> None:
    write_pictures(tmp_path / "images", 40)
    out = tmp_path / "results.json"
    inputs = [str(tmp_path / "images"), "--quiet", "--out", str(out), "--url", server.url]
    command = [sys.executable, "-m", "service.predict", *inputs, "--jobs", "2"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    journal = out.with_name("results.json.partial")

    def has_begun() -> bool:
        assert process.poll() is None, "it was done before it could be killed"
        return len(read_keys(journal)) >= 5

    poll_until(has_begun, timeout_s=60, pause_s=0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(read_keys(journal))
    assert not out.exists()
    served = read_images(server)
    predict_main([*inputs, "--jobs", "3"])
    assert not journal.exists()
    # The server may still have answered the two requests that were in flight when it was killed.
    assert 40 - done <= read_images(server) - served <= 40 - done + 2
    local = ["--model-repo", str(repo), "--device", "cpu", "--out", str(tmp_path / "local.json")]
    predict_main([str(tmp_path / "images"), "--quiet", *local])
    remote: list[dict[str, Any]] = json.loads(out.read_bytes())
    assert len(remote) == 80
    assert remote == json.loads((tmp_path / "local.json").read_bytes())


def read_images(server: ServerProcess) -> int:
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith('solo_images_total{model="blobs",version="1"}'):
            return round(float(line.rsplit(" ", 1)[1]))
    raise AssertionError("there is no such metric")


def test_predict_ends_when_the_server_does_and_goes_on_with_it(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.predict.sources.RETRY", Retry(attempts=2, backoff_s=0.01))
    write_pictures(tmp_path / "images", 6)
    port = str(free_port())
    flags = ("--model-repo", str(repo), *FLAGS, "--port", port)
    inputs = [str(tmp_path / "images"), "--quiet", "--out", str(tmp_path / "out.json")]
    inputs += ["--url", f"http://127.0.0.1:{port}", "--jobs", "1"]
    with pytest.raises(SystemExit, match="the same command continues"):
        predict_main(inputs)
    with run_server(tmp_path / "log", *flags):
        predict_main(inputs)
    assert len(json.loads((tmp_path / "out.json").read_bytes())) == 12
