"""Cost of one image in this process, over its size, its instances and the batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.candidates import SOLO_INPUT, STRIDE, draw_candidates, solo_spec
from benchmarks.decode import build_jpeg
from benchmarks.memory import added_bytes
from benchmarks.scaling_curve import Plan
from pipeline.decode import decode_image
from pipeline.encode import instance_to_coco
from pipeline.paste import paste_masks
from pipeline.postprocess import postprocess, select
from pipeline.preprocess import needed_hw, prepare
from pipeline.types import Candidates
from service.engines.base import BackendOptions
from service.models.repository import LoadedModel, load_version
from tests.support.blob_model import encode_picture

TILED_SIDES = (144, 256, 480, 704, 1040)
"""1, 4, 16, 36 and 81 tiles of the bundled model."""
CANVAS_SIZES_HW = ((240, 320), (480, 640), (960, 1280), (1920, 2560), (3024, 4032))
"""All of one shape, so that all have one canvas."""
CANVAS_INSTANCES = 100
INSTANCES = (1, 3, 10, 30, 100, 200)
INSTANCES_HW = (1080, 1920)
BATCHES = (1, 2, 4, 8, 16)

Costs = dict[str, float]


class Clock:
    """CPU milliseconds of this process, stage by stage."""

    def __init__(self) -> None:
        self.costs: Costs = {}
        self._began_s = time.process_time()

    def lap(self, stage: str) -> None:
        """Ends a stage."""
        now_s = time.process_time()
        self.costs[f"{stage}, CPU ms"] = 1e3 * (now_s - self._began_s)
        self._began_s = now_s


def with_memory(run: Callable[[], Costs]) -> Callable[[], Costs]:
    """A point that also says what it adds to the resident set.

    That is measured in the first round alone, which warms up: it disturbs the times.
    """
    added_mb: list[float] = []

    def measure() -> Costs:
        if not added_mb:
            added_mb.append(added_bytes(run) / 1e6)
        return {**run(), "MB added": added_mb[0]}

    return measure


def load_model(folder: Path) -> LoadedModel:
    """The model on one thread."""
    return load_version(folder, options=BackendOptions(device="cpu", threads=1))


def plan_tiles(model: LoadedModel, picture: Path) -> Plan:
    """A model of tiles: the whole way of a picture, repeated to the size."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))

    def build(side: int) -> Callable[[], Costs]:
        repeats = -(-side // pixels.shape[0]), -(-side // pixels.shape[1]), 1
        body = encode_picture(np.tile(pixels, repeats)[:side, :side], "JPEG")
        return with_memory(lambda: run_image(model, body))

    points = {side * side / 1e6: build(side) for side in TILED_SIDES}
    return Plan("Image size, tiles (the bundled model)", "megapixels", points)


def run_image(model: LoadedModel, body: bytes) -> Costs:
    """One image from bytes to COCO's objects."""
    clock = Clock()
    prepared = prepare(decode_image(body), model.config.input)
    clock.lap("decode and prepare")
    size = model.config.limits.max_batch
    starts = range(0, len(prepared.tiles), size)
    found = [c for i in starts for c in model.backend.infer(prepared.tiles[i : i + size])]
    clock.lap("engine")
    for instance in postprocess(prepared, found, model.config.postprocess):
        instance_to_coco(instance, model.config)
    clock.lap("post-process and encode")
    return clock.costs


def plan_canvas() -> Plan:
    """SOLO's canvas of 800 px whatever the image: all but the engine."""
    count = CANVAS_INSTANCES
    _, candidates = draw_candidates(CANVAS_SIZES_HW[0], count)

    def build(image_hw: tuple[int, int]) -> Callable[[], Costs]:
        body = build_jpeg(*image_hw)
        return with_memory(lambda: run_around_engine(body, image_hw, candidates, count))

    points = {hw[0] * hw[1] / 1e6: build(hw) for hw in CANVAS_SIZES_HW}
    return Plan(f"Image size, one canvas of 800 px, {count} instances", "megapixels", points)


def run_around_engine(
    body: bytes, image_hw: tuple[int, int], candidates: Candidates, count: int
) -> Costs:
    """One image, the engine's answer given."""
    clock = Clock()
    image = decode_image(body, least_hw=needed_hw(image_hw, SOLO_INPUT))
    clock.lap("decode")
    prepared = prepare(image, SOLO_INPUT, image_hw=image_hw)
    clock.lap("prepare")
    postprocess(prepared, [candidates], solo_spec(count))
    clock.lap("post-process")
    return clock.costs


def plan_instances() -> Plan:
    """Post-processing over the instances, each found by five candidates."""

    def build(count: int) -> Callable[[], Costs]:
        prepared, candidates = draw_candidates(INSTANCES_HW, count)
        spec = solo_spec(count)
        (tile,) = prepared.tiles

        def run() -> Costs:
            clock = Clock()
            _, kept = select(candidates, spec, least_score=spec.score_threshold)
            clock.lap("NMS")
            masks = (candidates.mask_probs[index] for index in kept[:count])
            deque(paste_masks(masks, tile, STRIDE, INSTANCES_HW), maxlen=0)
            clock.lap("paste and RLE")
            return clock.costs

        return with_memory(run)

    name = f"Instances, in {INSTANCES_HW[1]}x{INSTANCES_HW[0]} px"
    return Plan(name, "instances", {count: build(count) for count in INSTANCES})


def plan_batch(folder: Path, picture: Path) -> Plan:
    """Engine calls of the model in `folder`, each batch with an engine of its own."""

    def build(size: int) -> Callable[[], Costs]:
        model = load_model(folder)
        image = decode_image(picture.read_bytes())
        tiles = prepare(image, model.config.input).tiles[:1] * size

        def run() -> Costs:
            clock = Clock()
            model.backend.infer(tiles)
            clock.lap("a canvas")
            return {name: cost / size for name, cost in clock.costs.items()}

        return with_memory(run)

    return Plan("Batch (the bundled model)", "canvases", {size: build(size) for size in BATCHES})
