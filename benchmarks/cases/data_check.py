"""`solo-data check` on a large generated data set: time and peak memory of the command.

COCO JSON with polygons in 80 classes, JPEG files of 64x64 px. The command is a process of its own;
it runs twice, because the sizes of the image files are kept for the second time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np

from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import ROOT, Report, Row

SIDE_PX = 64
CLASSES = 80
POINTS = 24


def data_check(
    *,
    images: Annotated[int, "generated images"] = 10_000,
    objects: Annotated[int, "of all images together"] = 300_000,
    seed: Annotated[int, "of the objects"] = 0,
) -> Report:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "data"
        size = generate(root, images, objects, seed)
        rows = [{"": run, **check(root, Path(name))} for run in ("first", "again")]
    data = {"images": images, "objects": objects, "annotations_bytes": size, "rows": rows}
    return Report(data=data, tables={"": rows})


def generate(root: Path, images: int, objects: int, seed: int) -> int:
    """Writes the data set; returns the bytes of its annotation file."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    picture = cv2.imencode(".jpg", rng.integers(0, 255, (SIDE_PX, SIDE_PX, 3), np.uint8))[1]
    for number in range(1, images + 1):
        (root / "images" / f"{number:012}.jpg").write_bytes(picture.tobytes())
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    annotations: list[dict[str, Any]] = []
    for number in range(objects):
        radius = rng.uniform(2, SIDE_PX / 4)
        outline = (rng.uniform(radius, SIDE_PX - radius, 2) + radius * circle).round(2)
        annotations.append(
            {
                "id": number + 1,
                "image_id": number % images + 1,
                "category_id": number % CLASSES + 1,
                "segmentation": [outline.ravel().tolist()],
                "area": round(np.pi * radius**2, 2),
                "iscrowd": 0,
            }
        )
    content = {
        "images": [
            {"id": n, "file_name": f"{n:012}.jpg", "height": SIDE_PX, "width": SIDE_PX}
            for n in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": n, "name": f"class {n}"} for n in range(1, CLASSES + 1)],
    }
    path = root / "annotations" / "train.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    return path.stat().st_size


def check(root: Path, cache: Path) -> Row:
    """Time and peak memory of the command, which keeps the sizes of the files in a cache.

    Raises:
        BenchmarkError: It refuses the data set.
    """
    command = [sys.executable, "-m", "training.data_command", "check", str(root)]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--split", "train"],
        cwd=ROOT,
        env={**os.environ, "SOLO_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise BenchmarkError(f"the data set is refused: {text.strip()[-300:]}")
    return {
        "wall s": time.perf_counter() - started,
        "CPU s": usage.ru_utime + usage.ru_stime,
        "peak memory, MiB": usage.ru_maxrss / 1024,
    }
