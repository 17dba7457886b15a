"""JPEG decoding: the server's against Pillow's and OpenCV's, in alternating runs.

python -m benchmarks.decode --out benchmarks/results/decode_cpu.json
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from pipeline.decode import decode_image
from pipeline.model_config import InputSpec, KeepRatioResize
from pipeline.preprocess import needed_hw

SIZES_HW = ((480, 640), (1080, 1920), (3024, 4032))
SOLO = InputSpec(resize=KeepRatioResize(short_side=800, long_side=1333))


def build_jpeg(height: int, width: int) -> bytes:
    """A photograph's mix of smooth parts, edges and noise, quality 90."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / 60
    waves = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x) * np.cos(2 * y)], axis=2)
    waves += 0.5 * np.sign(np.sin(x * 1.7) * np.sin(y * 1.3))[..., None]
    noise = rng.normal(0, 6, (height, width, 1))
    pixels = np.clip(127 + 70 * waves + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def decoders(data: bytes, image_hw: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Each decodes the file to RGB; `scaled` no larger than SOLO at 800 px needs it."""
    encoded = np.frombuffer(data, np.uint8)
    least_hw = needed_hw(image_hw, SOLO)
    return {
        "server": lambda: decode_image(data),
        "pillow": lambda: np.asarray(Image.open(io.BytesIO(data))),
        "opencv": lambda: cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB),
        "server_scaled": lambda: decode_image(data, least_hw=least_hw),
    }


def measure(image_hw: tuple[int, int], repeats: int) -> dict[str, object]:
    """CPU milliseconds of each decoder (median), and others' time over the server's, by round."""
    data = build_jpeg(*image_hw)
    steps = decoders(data, image_hw)
    laps: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            began_s = time.process_time()
            step()
            laps[name].append(time.process_time() - began_s)
    seconds = {name: np.array(values[1:]) for name, values in laps.items()}  # the first warms up
    ratios = {
        name: np.quantile(values / seconds["server"], [0.25, 0.5, 0.75]).round(2).tolist()
        for name, values in seconds.items()
        if name != "server"
    }
    return {
        "image_hw": image_hw,
        "file_bytes": len(data),
        "cpu_ms": {name: round(1e3 * float(np.median(v)), 2) for name, v in seconds.items()},
        "time_over_servers_quartiles": ratios,
    }


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    rows = [measure(size, options.repeats) for size in SIZES_HW]
    command = f"python -m benchmarks.decode --repeats {options.repeats}"
    text = json.dumps({"command": command, "rows": rows}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
