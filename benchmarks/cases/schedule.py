"""An ESTIMATE of the paper's training on COCO: hours of a schedule on several GPUs.

Measured here: CPU time to load, augment and assign the targets of an image of COCO's size. Counted:
the network's operations. Assumed: the GPU's matrix rate, the share of it that training reaches, and
three times the forward operations for a step. NOT RUN ON HARDWARE.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np

from benchmarks.cases.flops import count_flops, find_canvas
from benchmarks.gpu.subjects import find_config
from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report, Row
from tests.support.tiny import CLASSES, annotation_of, disc, write_image, write_split
from training.configs.coco import SCHEDULES
from training.configs.schema import Config
from training.data.coco import CocoDataset
from training.data.loader import TrainingSamples, collate

COCO_IMAGES = 117_266
"""Images of train2017 with annotations."""
IMAGE_HW = (480, 640)
OBJECTS = 7
STEP_OPERATIONS = 3.0
"""Forward and backward over forward."""


def schedule(
    *,
    models: Annotated[tuple[str, ...], "configurations"] = ("solo_r50", "solo_512_r50"),
    name: Annotated[str, "of the schedule"] = "6x",
    gpus: Annotated[int, "GPUs"] = 8,
    tflop_s: Annotated[float, "measured matrix rate of one, bf16"] = 788,
    shares: Annotated[tuple[float, ...], "of that rate which training reaches"] = (0.2, 0.4),
    cores: Annotated[int, "that load images, in all"] = 128,
    images: Annotated[int, "that are loaded to measure"] = 8,
) -> Report:
    if name not in SCHEDULES:
        raise BenchmarkError(f"no schedule {name!r}, expected {', '.join(SCHEDULES)}")
    if min(gpus, images, cores) < 1 or not all(0 < share <= 1 for share in shares):
        raise BenchmarkError("--gpus, --cores, --images are at least 1, --shares within 0..1")
    total = COCO_IMAGES * SCHEDULES[name].epochs
    rows: list[Row] = []
    for model in models:
        config = find_config(model)
        load_s = measure_loading(config, images)
        gflop = STEP_OPERATIONS * count_flops(model, find_canvas(model))["total"]
        for share in shares:
            rows.append(
                {
                    "model": model,
                    "share": share,
                    **estimate(total, gflop, load_s, gpus * share * tflop_s, cores),
                }
            )
    note = f"ESTIMATE: {name}, {SCHEDULES[name].epochs} epochs, {gpus} GPUs, {cores} cores"
    return Report(
        data={"images": total, "gpus": gpus, "cores": cores, "rows": rows},
        tables={note: rows},
        packages=("torch",),
    )


def estimate(total: int, gflop: float, load_s: float, tflop_s: float, cores: int) -> Row:
    """Hours until all images are trained on, and what takes them.

    Args:
        total: Images over all epochs.
        gflop: Operations of an image's step.
        load_s: CPU seconds to load an image.
        tflop_s: Rate of all GPUs.
        cores: That load images.
    """
    compute, loading = 1e3 * tflop_s / gflop, cores / load_s
    rate = min(compute, loading)
    return {
        "GFLOP a step": round(gflop),
        "loading, CPU ms": round(1e3 * load_s, 1),
        "GPUs, images/s": round(compute),
        "loading, images/s": round(loading),
        "hours": round(total / rate / 3600, 1),
        "bound by": "GPUs" if compute <= loading else "loading",
    }


def measure_loading(config: Config, images: int) -> float:
    """CPU seconds of this process for an image, from its file to its targets."""
    with tempfile.TemporaryDirectory() as root:
        data = CocoDataset(write_data(Path(root), images), "train")
        samples = TrainingSamples(data, config, seed=0)
        collate([samples[(0, 0)]], config)
        began_s = time.process_time()
        for index in range(images):
            collate([samples[(1, index)]], config)
        return (time.process_time() - began_s) / images


def write_data(root: Path, images: int) -> Path:
    """Noisy JPEGs of COCO's size with discs of its sizes."""
    rng = np.random.default_rng(0)
    height, width = IMAGE_HW
    names, annotations = [], []
    for number in range(1, images + 1):
        small = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        picture = np.kron(small, np.ones((8, 8, 1), np.uint8))
        names.append((f"{number}.jpg", height, width))
        write_image(root / "images" / names[-1][0], picture)
        for radius in np.exp(rng.uniform(np.log(10), np.log(150), OBJECTS)):
            mask = disc(height, width, rng.uniform(0, height), rng.uniform(0, width), radius)
            annotations.append(annotation_of(mask, number, CLASSES[number % 2].category_id))
    write_split(root, "train", names, annotations)
    return root
