"""What `benchmarks scaling` measures of an image in this process: by place on the axis, a call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

from benchmarks.candidates import SOLO_INPUT, STRIDE, draw_candidates, solo_spec
from benchmarks.cases.stages import run_stages
from benchmarks.harness.memory import added_bytes
from benchmarks.harness.rounds import StageClock
from benchmarks.inputs import build_jpeg, build_tiled_jpeg
from benchmarks.ours import load_model
from pipeline.decode import decode_image
from pipeline.paste import paste_masks
from pipeline.postprocess import postprocess, select
from pipeline.preprocess import needed_hw, prepare

TILED_SIDES = (144, 256, 480, 704, 1040)
"""1, 4, 16, 36 and 81 tiles of the bundled model."""
CANVAS_SIZES_HW = ((240, 320), (480, 640), (960, 1280), (1920, 2560), (3024, 4032))
"""All of one shape, so that all have one canvas."""
CANVAS_INSTANCES = 100
INSTANCES = (1, 3, 10, 30, 100, 200)
INSTANCES_HW = (1080, 1920)
BATCHES = (1, 2, 4, 8, 16)

Costs = dict[str, float]
Points = dict[float, Callable[[], Costs]]


def with_memory(run: Callable[[], Costs]) -> Callable[[], Costs]:
    """A point that shows CPU milliseconds, and what its first call adds to the resident set.

    Memory is measured in the first round alone, which warms up: it disturbs the times.
    """
    added_mb: list[float] = []

    def measure() -> Costs:
        if not added_mb:
            added_mb.append(added_bytes(run) / 1e6)
        cpu = {k.removesuffix("_cpu_s"): v for k, v in run().items() if k.endswith("_cpu_s")}
        shown = {f"{stage}, CPU ms": 1e3 * seconds for stage, seconds in cpu.items()}
        return {**shown, "MB added": added_mb[0]}

    return measure


def plan_tiles(folder: Path, picture: Path) -> Points:
    """A model of tiles: all steps of a picture, repeated to the size."""
    model = load_model(folder)

    def build(side: int) -> Callable[[], Costs]:
        body = build_tiled_jpeg(picture, side)
        return with_memory(lambda: run_stages(model, body))

    return {side * side / 1e6: build(side) for side in TILED_SIDES}


def plan_canvas() -> Points:
    """SOLO's canvas of 800 px whatever the image: all steps but the engine."""
    _, candidates = draw_candidates(CANVAS_SIZES_HW[0], CANVAS_INSTANCES)

    def build(image_hw: tuple[int, int]) -> Callable[[], Costs]:
        body = build_jpeg(*image_hw)

        def run() -> Costs:
            clock = StageClock()
            image = decode_image(body, least_hw=needed_hw(image_hw, SOLO_INPUT))
            clock.lap("decode")
            prepared = prepare(image, SOLO_INPUT, image_hw=image_hw)
            clock.lap("prepare")
            postprocess(prepared, [candidates], solo_spec(CANVAS_INSTANCES))
            clock.lap("post-process")
            return clock.costs

        return with_memory(run)

    return {hw[0] * hw[1] / 1e6: build(hw) for hw in CANVAS_SIZES_HW}


def plan_instances() -> Points:
    """Post-processing over the instances, each found by five candidates."""

    def build(count: int) -> Callable[[], Costs]:
        prepared, candidates = draw_candidates(INSTANCES_HW, count)
        spec = solo_spec(count)
        (tile,) = prepared.tiles

        def run() -> Costs:
            clock = StageClock()
            _, kept = select(candidates, spec, least_score=spec.score_threshold)
            clock.lap("NMS")
            masks = (candidates.mask_probs[index] for index in kept[:count])
            deque(paste_masks(masks, tile, STRIDE, INSTANCES_HW), maxlen=0)
            clock.lap("paste and RLE")
            return clock.costs

        return with_memory(run)

    return {count: build(count) for count in INSTANCES}


def plan_batch(folder: Path, picture: Path) -> Points:
    """Engine calls of a model, each batch with an engine of its own; costs of a canvas."""

    def build(size: int) -> Callable[[], Costs]:
        model = load_model(folder)
        image = prepare(decode_image(picture.read_bytes()), model.config.input)
        tiles = [image.tiles[0]] * size

        def run() -> Costs:
            clock = StageClock()
            model.backend.infer(tiles)
            clock.lap("a canvas")
            return {name: cost / size for name, cost in clock.costs.items()}

        return with_memory(run)

    return {size: build(size) for size in BATCHES}
