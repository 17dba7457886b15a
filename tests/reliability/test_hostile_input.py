"""Behaviour 10: what is made to hurt is refused early and cheaply."""

from __future__ import annotations

import io
import itertools
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.harness.memory import reset_peak
from tests.reliability.conftest import Report
from tests.support.blob_model import KEEP_RATIO_INPUT, draw_picture, encode_picture, publish
from tests.support.memory import read_peak_bytes, read_resident_bytes
from tests.support.pictures import build_jpeg_of_scans, build_png_header
from tests.support.server import CPU_FLAGS, ServerProcess, run_server

MAX_BODY_BYTES = 2_000_000
PICTURE = draw_picture(64, 96, {"red": (4, 8, 40, 20), "blue": (60, 40, 30, 16)})
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How an upright picture is stored for each EXIF orientation."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("hostile")
    publish(root / "repo", input=KEEP_RATIO_INPUT)
    publish(root / "repo", "tiles")
    limit = ("--max-body-bytes", str(MAX_BODY_BYTES))
    flags = ("--model-repo", str(root / "repo"), "--default-model", "blobs", *CPU_FLAGS, *limit)
    with run_server(root / "log", *flags) as running:
        httpx.post(f"{running.url}/segment", content=encode_picture(PICTURE)).raise_for_status()
        yield running


def build_png_bomb(side: int) -> bytes:
    """A whole PNG of side x side black and white pixels, all black."""
    rows = zlib.compressobj(1)
    row = bytes(1 + (side + 7) // 8)
    data = b"".join([*(rows.compress(row * 100) for _ in range(side // 100)), rows.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def test_a_png_of_50000_by_50000_is_refused_by_its_header(
    server: ServerProcess, report: Report
) -> None:
    bomb = build_png_bomb(50_000)
    assert len(bomb) < MAX_BODY_BYTES
    before = read_resident_bytes(server.process.pid)
    reset_peak(server.process.pid)
    seconds = []
    for _ in range(10):
        began_s = time.perf_counter()
        response = httpx.post(f"{server.url}/segment", content=bomb, timeout=60)
        seconds.append(time.perf_counter() - began_s)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "image_too_large")
    extra = read_peak_bytes(server.process.pid) - before
    report("median_ms", 1e3 * sorted(seconds)[5])
    report("extra_mb", extra / 1e6)
    assert extra < 50e6
    assert sorted(seconds)[5] < 1  # 0.1 is the aim; other work on the machine adds to it


@pytest.mark.parametrize(("height", "width"), [(1, 40_000_000), (40_000_000, 1)])
def test_a_thin_image_is_refused_by_its_canvases(
    server: ServerProcess, report: Report, height: int, width: int
) -> None:
    """It has no more pixels than are allowed, but needs 833,333 tiles."""
    before = read_resident_bytes(server.process.pid)
    reset_peak(server.process.pid)
    began_s = time.perf_counter()
    data = build_png_header(width, height)
    response = httpx.post(f"{server.url}/segment?model=tiles", content=data, timeout=60)
    report("ms", 1e3 * (time.perf_counter() - began_s))
    extra = read_peak_bytes(server.process.pid) - before
    report("extra_mb", extra / 1e6)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_many_canvases")
    assert "needs 833333 canvases, the server allows 4096" in response.text
    assert extra < 50e6


def test_the_largest_thin_image_takes_little_memory_and_is_stopped_by_its_deadline(
    server: ServerProcess, report: Report
) -> None:
    width = 48 * 4095 + 64
    data = encode_picture(np.full((1, width, 3), 200, np.uint8))
    before = read_resident_bytes(server.process.pid)
    reset_peak(server.process.pid)
    began_s = time.perf_counter()
    path = "/segment?model=tiles&timeout_ms=1000"
    response = httpx.post(f"{server.url}{path}", content=data, timeout=60)
    seconds = time.perf_counter() - began_s
    extra = read_peak_bytes(server.process.pid) - before
    report("seconds", seconds)
    report("extra_mb", extra / 1e6)
    if response.status_code == 200:  # a fast machine
        assert response.json()["canvases"] == 4096
    else:
        assert response.status_code == 504
        assert "of 4096 canvases were done" in response.text
    assert seconds < 5
    assert extra < 200e6


def send_for_ever(url: str) -> tuple[int, float, bytes]:
    """A chunked body without an end, by a client that never looks up.

    Returns:
        Bytes that went out until the server hung up, the time, and what it had answered.
    """
    address = httpx.URL(url)
    chunk = b"%x\r\n%b\r\n" % (100_000, bytes(100_000))
    sent, began_s = 0, time.monotonic()
    with (
        socket.create_connection((address.host, address.port or 80), timeout=60) as connection,
        ThreadPoolExecutor(1) as pool,
    ):
        connection.sendall(
            b"POST /segment HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        # Read meanwhile: what a reset connection had received may be lost.
        answer = pool.submit(connection.recv, 65536)
        with suppress(OSError):
            for _ in range(10_000):
                connection.sendall(chunk)
                sent += 100_000
                time.sleep(0.0005)
        return sent, time.monotonic() - began_s, answer.result()


def test_a_chunked_body_of_a_gigabyte_is_cut(server: ServerProcess, report: Report) -> None:
    before = read_resident_bytes(server.process.pid)
    reset_peak(server.process.pid)
    sent, seconds, answer = send_for_ever(server.url)
    extra = read_peak_bytes(server.process.pid) - before
    report("sent_mb", sent / 1e6)
    report("cut_after_s", seconds)
    report("extra_mb", extra / 1e6)
    assert sent < 1_000_000_000
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert extra < 50e6
    assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200


def test_formats_are_known_by_content(server: ServerProcess) -> None:
    gif = encode_picture(PICTURE, "GIF")
    for name in ("a.jpg", "a.png", None):
        if name is None:
            response = httpx.post(
                f"{server.url}/segment", content=gif, headers={"content-type": "image/jpeg"}
            )
        else:
            files = [("images", (name, gif, "image/jpeg"))]
            response = httpx.post(f"{server.url}/segment", files=files)
        assert response.status_code == 415
        assert response.json()["error"]["code"] == "unsupported_format"


def test_eight_orientations_give_the_same_masks(server: ServerProcess) -> None:
    answers = []
    for orientation, turn in TURNS.items():
        stored = Image.fromarray(PICTURE)
        stored = stored if turn is None else stored.transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        stored.save(buffer, "PNG", exif=exif)
        response = httpx.post(f"{server.url}/segment", content=buffer.getvalue())
        (result,) = response.raise_for_status().json()["results"]
        assert (result["width"], result["height"]) == (96, 64)
        answers.append(result["instances"])
    assert len(answers[0]) == 2
    assert all(one == other for one, other in itertools.pairwise(answers))


def test_a_jpeg_of_a_thousand_scans_is_refused(server: ServerProcess, report: Report) -> None:
    began_s = time.perf_counter()
    data = build_jpeg_of_scans(2000, 1000)
    report("bytes", len(data))
    response = httpx.post(f"{server.url}/segment", content=data, timeout=300)
    report("seconds", time.perf_counter() - began_s)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "corrupt_image")
