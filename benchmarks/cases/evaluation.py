"""Mask AP of many images: our evaluation beside pycocotools and, if installed, faster-coco-eval.

    pip install faster-coco-eval; python -m benchmarks evaluation --images 5000

Generated images of 480x640 px: about 7 objects and up to 100 detections each, 80 classes. All
evaluate the same run-length masks in one process, in turns, from the annotations in memory to the
numbers. Before anything is timed, precision and recall of every class, area, threshold and limit
of detections are compared with those of pycocotools; a difference is a failure.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.harness.report import Report
from benchmarks.harness.rounds import take_turns, timed
from training.coco_metrics import mask_ap

HEIGHT, WIDTH = 480, 640
CLASSES = 80
POINTS = 14
OURS, PYCOCOTOOLS, FASTER = "ours", "pycocotools", "faster-coco-eval"
Content = dict[str, Any]


def evaluation(
    *,
    images: Annotated[int, "generated images"] = 5000,
    detections: Annotated[int, "of an image at most"] = 100,
    rounds: Annotated[int, "that count"] = 3,
    warm_ups: Annotated[int, "rounds before them"] = 0,
    seed: Annotated[int, "of the images"] = 0,
) -> Report:
    truth, results = generate(images, detections, seed)
    ways: dict[str, Callable[[], object]] = {
        OURS: lambda: mask_ap(truth, results),
        PYCOCOTOOLS: lambda: evaluate(COCO, COCOeval, truth, results),
    }
    if importlib.util.find_spec("faster_coco_eval") is not None:
        faster: Any = importlib.import_module("faster_coco_eval")
        ways[FASTER] = lambda: evaluate(faster.COCO, faster.COCOeval_faster, truth, results)
    failures = compare(ways, *generate(min(images, 500), detections, seed + 1))
    samples = take_turns(
        {name: timed(way) for name, way in ways.items()}, rounds, warm_ups=warm_ups
    )
    rows = [
        {
            "": name,
            "s": samples.median(name, "wall_s"),
            "CPU s": samples.median(name, "cpu_s"),
            "CPU time of pycocotools' (range)": str(samples.ratio(name, PYCOCOTOOLS, "cpu_s")),
        }
        for name in ways
    ]
    return Report(
        data={
            "images": images,
            "objects": len(truth["annotations"]),
            "detections": len(results),
            "samples": samples.values,
        },
        tables={"": rows},
        failures=failures,
        packages=("pycocotools", *([FASTER] if FASTER in ways else [])),
    )


def generate(images: int, detections: int, seed: int) -> tuple[Content, list[Content]]:
    """Ground truth and results; a fifth of the detections are objects that were moved a little."""
    rng = np.random.default_rng(seed)
    annotations: list[Content] = []
    results: list[Content] = []
    for image_id in range(1, images + 1):
        count = int(rng.poisson(7))
        shapes = draw(rng, count)
        labels = rng.integers(1, CLASSES + 1, count)
        for rle, label in zip(encode(shapes), labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(label),
                    "segmentation": rle,
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "area": int(coco_mask.area(rle)),
                    "iscrowd": int(rng.random() < 0.01),
                }
            )
        copies = np.repeat(np.arange(count), 3)
        moved = shapes[copies] + rng.normal(0, 3, (len(copies), 1, 2))
        others = draw(rng, max(0, int(rng.integers(detections // 2, detections + 1)) - len(moved)))
        found = encode(np.concatenate([moved, others])[:detections])
        names = np.concatenate([labels[copies], rng.integers(1, CLASSES + 1, len(others))])
        scores = rng.beta(1, 6, len(found)) + 0.5 * (np.arange(len(found)) < len(moved))
        for rle, label, score in zip(found, names[: len(found)], scores, strict=True):
            result = {"image_id": image_id, "category_id": int(label), "score": float(score)}
            results.append({**result, "segmentation": rle})
    known = [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)]
    return {"images": known, "categories": categories, "annotations": annotations}, results


def draw(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Outlines [N, points, 2] x, y; sizes as in COCO, most of them small."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, (count, POINTS)), axis=1)
    radius = rng.lognormal(3.2, 0.9, (count, 1)) * rng.uniform(0.6, 1, (count, POINTS))
    centre = rng.uniform(0, 1, (count, 1, 2)) * (WIDTH, HEIGHT)
    outlines: NDArray[np.float64] = np.stack([np.cos(angles), np.sin(angles)], axis=2)
    outlines *= radius[..., None]
    outlines += centre
    return outlines


def encode(shapes: NDArray[np.float64]) -> list[Content]:
    """Outlines -> run-length masks."""
    if not len(shapes):
        return []
    polygons = [shape.ravel() for shape in shapes]
    rles: list[Content] = coco_mask.frPyObjects(polygons, HEIGHT, WIDTH)
    return [{**rle, "counts": rle["counts"].decode()} for rle in rles]


def evaluate(index: Any, evaluator: Any, truth: Content, results: list[Content]) -> Any:
    """Precision and recall as pycocotools' classes, or those that replace them, give them."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = index()
        known.dataset = {**truth, "annotations": [dict(a) for a in truth["annotations"]]}
        known.createIndex()
        run = evaluator(known, known.loadRes([dict(r) for r in results]), "segm")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def compare(
    ways: dict[str, Callable[[], object]], truth: Content, results: list[Content]
) -> list[str]:
    """The differences from pycocotools, one line for each way that has any."""
    expected = evaluate(COCO, COCOeval, truth, results)
    failures = []
    first = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), expected.stats, strict=False))
    numbers = mask_ap(truth, results)
    if any(numbers[name] != value for name, value in first.items()):
        failures.append(f"{OURS}: {numbers}, pycocotools: {first}")
    if FASTER in ways:
        faster: Any = importlib.import_module("faster_coco_eval")
        found = evaluate(faster.COCO, faster.COCOeval_faster, truth, results)
        for name in ("precision", "recall", "scores"):
            differ = np.asarray(found.eval[name]) != expected.eval[name]
            if differ.any():
                failures.append(f"{FASTER}: {differ.sum()} of {differ.size} {name} differ")
        if not np.array_equal(found.stats[:12], expected.stats):
            failures.append(f"{FASTER}: {found.stats[:12]}, pycocotools: {expected.stats}")
    return failures
