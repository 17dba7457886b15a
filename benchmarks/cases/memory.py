"""Peak memory of the server for one image, beyond its decoded pixels (3 bytes each).

For each image a new server process serves a few small ones; then its resident set is the baseline,
its peak is reset, and the image is sent. The model is a cheap graph with the bundled model's tiles.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import httpx
import numpy as np
from PIL import Image

from benchmarks.harness import BenchmarkError
from benchmarks.harness.memory import added_bytes, read_status
from benchmarks.harness.report import Report, Row
from benchmarks.harness.server import Server, serve_ours
from benchmarks.inputs import NUCLEI
from benchmarks.ours import canvases_of, read_model
from tests.support.blob_model import encode_picture, publish

CHANNEL_BYTES = 3
SMALL_PX = 256
Case = Literal["line", "square", "photo"]
SIZES_HW = {"line": (1, 2_000_000), "square": (7000, 7000), "photo": (3024, 4032)}
"""Blank PNGs, and a JPEG with many objects."""


def memory(
    *,
    cases: Annotated[tuple[Case, ...], "1x2,000,000; 7000x7000; 3024x4032"] = (
        *("line", "square"),
        "photo",
    ),
    rounds: Annotated[int, "new servers for each image"] = 3,
    object_px: Annotated[int, "from one object to the next in the photo"] = 24,
) -> Report:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        config, _ = read_model(NUCLEI)
        model = publish(Path(name) / "repo", input=config.input.model_dump(mode="json"))
        small = encode_picture(draw_objects((SMALL_PX, SMALL_PX), object_px), "JPEG")
        for case in cases:
            image_hw = SIZES_HW[case]
            body = build_image(case, object_px)
            found = [
                measure(model, image_hw, small, body, Path(name) / "log") for _ in range(rounds)
            ]
            pixels = image_hw[0] * image_hw[1]
            beyond = [row["added_mb"] - CHANNEL_BYTES * pixels / 1e6 for row in found]
            rows.append(
                {
                    "image": f"{case}, {image_hw[0]}x{image_hw[1]}",
                    "canvases": canvases_of(model, image_hw),
                    "file, MB": len(body) / 1e6,
                    "pixels, MB": CHANNEL_BYTES * pixels / 1e6,
                    "baseline, MB": float(np.median([row["baseline_mb"] for row in found])),
                    "added, MB": float(np.median([row["added_mb"] for row in found])),
                    "beyond the pixels, MB": float(np.median(beyond)),
                    "range": f"{min(beyond):.0f}-{max(beyond):.0f}",
                }
            )
    return Report(data={"rows": rows}, tables={"": rows})


def draw_objects(
    image_hw: tuple[int, int], object_px: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Squares of one colour after the other on black, [H, W, 3]."""
    picture = np.zeros((*image_hw, 3), np.uint8)
    half = object_px // 2
    for index, y in enumerate(range(half, image_hw[0] - half, object_px)):
        for number, x in enumerate(range(half, image_hw[1] - half, object_px)):
            picture[y : y + half, x : x + half, (index + number) % 3] = 255
    return picture


def build_image(case: str, object_px: int) -> bytes:
    """The image's file."""
    height, width = SIZES_HW[case]
    if case == "photo":
        return encode_picture(draw_objects((height, width), object_px), "JPEG")
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def measure(model: Path, image_hw: tuple[int, int], small: bytes, body: bytes, log: Path) -> Row:
    """Resident set before the image, and what it adds at its peak, MB."""
    pixels = image_hw[0] * image_hw[1]
    canvases = max(canvases_of(model, hw) for hw in (image_hw, (SMALL_PX, SMALL_PX)))
    limits = {
        "SOLO_MAX_IMAGE_PIXELS": max(pixels, SMALL_PX**2),
        "SOLO_MAX_IMAGE_CANVASES": canvases,
        "SOLO_MAX_QUEUE_CANVASES": 4 * canvases,
    }
    environment = {name: str(value) for name, value in limits.items()}
    flags = ("--model-repo", f"{model.parent}", "--device", "cpu", "--threads", "1")
    with serve_ours(log, *flags, environment=environment) as server:
        for _ in range(3):
            ask(server, small)
        baseline = read_status("VmRSS", server.process.pid)
        added = added_bytes(lambda: ask(server, body), server.process.pid)
    return {"baseline_mb": baseline / 1e6, "added_mb": added / 1e6}


def ask(server: Server, body: bytes) -> None:
    """Segments one image.

    Raises:
        BenchmarkError: The answer is not 200, or the image failed.
    """
    answer = httpx.post(f"{server.url}/segment", content=body, timeout=3600)
    if answer.status_code != 200:
        raise BenchmarkError(f"{server.url} answered {answer.status_code}: {answer.text[:300]}")
