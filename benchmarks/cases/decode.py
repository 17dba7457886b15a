"""JPEG decoding: the server's, full and scaled, beside Pillow's and OpenCV's."""

from __future__ import annotations

import io
from typing import Annotated

import cv2
import numpy as np
from PIL import Image

from benchmarks.candidates import SOLO_INPUT
from benchmarks.harness.report import Report, Row
from benchmarks.harness.rounds import take_turns, timed
from benchmarks.inputs import build_jpeg
from pipeline.decode import decode_image
from pipeline.preprocess import needed_hw

SIZES_HW = ((480, 640), (1080, 1920), (3024, 4032))
SERVER = "server"


def decode(*, rounds: Annotated[int, "that count"] = 15) -> Report:
    cv2.setNumThreads(1)
    data, table = [], []
    for image_hw in SIZES_HW:
        row = measure(image_hw, rounds)
        data.append(row)
        ratios = {f"{name} / server": text for name, text in row["time_over_servers"].items()}
        table.append({"image": f"{image_hw[0]}x{image_hw[1]}", **row["cpu_ms"], **ratios})
    return Report(data={"rows": data}, tables={"CPU ms": table}, packages=("pillow",))


def measure(image_hw: tuple[int, int], rounds: int) -> Row:
    """CPU milliseconds of each decoder; `server_scaled` decodes no larger than SOLO needs it."""
    data = build_jpeg(*image_hw)
    encoded = np.frombuffer(data, np.uint8)
    least_hw = needed_hw(image_hw, SOLO_INPUT)
    variants = {
        SERVER: timed(lambda: decode_image(data)),
        "pillow": timed(lambda: np.asarray(Image.open(io.BytesIO(data)))),
        "opencv": timed(lambda: cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)),
        "server_scaled": timed(lambda: decode_image(data, least_hw=least_hw)),
    }
    samples = take_turns(variants, rounds)
    return {
        "image_hw": image_hw,
        "file_bytes": len(data),
        "cpu_ms": {name: 1e3 * samples.median(name, "cpu_s") for name in variants},
        "time_over_servers": {
            name: str(samples.ratio(name, SERVER, "cpu_s")) for name in variants if name != SERVER
        },
    }
