"""python -m training.pictures: draws the instances of a model beside the ground truth.

The images are the best, the middle and the worst ones of a split, or those that are named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from pipeline.contour import draw_contour, fill_instance
from pipeline.draw import draw_instances
from pipeline.encode import decode_box
from pipeline.model_config import Task
from pipeline.runs import BoxMask, build_instance
from pipeline.types import Detection, UInt8
from service.models.repository import LoadedModel, load_version
from training.data.coco import CocoDataset
from training.data.records import DatasetError
from training.matching import match

MATCH_IOU = 0.5
GAP_PX = 6


def match_f1(found: Sequence[dict[str, Any]], truth: Sequence[dict[str, Any]]) -> float:
    """F1 of masks matched one to one at IoU 0.5, in order of score; 1 if both are empty."""
    if not found or not truth:
        return float(not found and not truth)
    iou = np.asarray(coco_mask.iou(list(found), list(truth), [0] * len(truth)), np.float64)
    matched = sum(j is not None for j in match(iou, MATCH_IOU))
    return 2 * matched / (len(found) + len(truth))


def _truth(data: CocoDataset, index: int, task: Task) -> list[Detection]:
    """Ground truth of the task: masks, or their contours."""
    instances = []
    for a in data.records[index].annotations:
        x, y, w, h = (int(v) for v in a.box_xywh)
        truth = Detection(a.label, 1.0, a.rle, (x, y, w, h), w * h)
        if task == "contour":
            outline = BoxMask(y, x, draw_contour(decode_box(truth)).astype(np.bool_))
            truth = build_instance(outline, data.image(index).shape[:2], a.label, 1.0)
        instances.append(truth)
    return instances


def side_by_side(
    image: UInt8,
    found: Sequence[Detection],
    truth: Sequence[Detection],
    task: Task = "segmentation",
) -> UInt8:
    """The image, the found instances and the ground truth, left to right at 2x."""
    parts = [image, draw_instances(image, found, task), draw_instances(image, truth, task)]
    size = (image.shape[1] * 2, image.shape[0] * 2)
    large = [cv2.resize(p, size, interpolation=cv2.INTER_NEAREST) for p in parts]
    gap = np.full((size[1], GAP_PX, 3), 255, np.uint8)
    return np.hstack([large[0], gap, large[1], gap, large[2]]).astype(np.uint8)


def stack(rows: Sequence[UInt8]) -> UInt8:
    """Images stacked vertically on a white background."""
    width = max(row.shape[1] for row in rows)
    height = sum(row.shape[0] + GAP_PX for row in rows) - GAP_PX
    canvas = np.full((height, width, 3), 255, np.uint8)
    top = 0
    for row in rows:
        canvas[top : top + row.shape[0], : row.shape[1]] = row
        top += row.shape[0] + GAP_PX
    return canvas


def f1_of(found: Sequence[Detection], data: CocoDataset, index: int, task: Task) -> float:
    """`match_f1` on an image; contours are filled first."""
    regions = map(fill_instance, found) if task == "contour" else found
    truth = [a.rle for a in data.records[index].annotations]
    return match_f1([region.rle for region in regions], truth)


def rank(model: LoadedModel, data: CocoDataset) -> list[tuple[float, int, list[Detection]]]:
    """F1, index and instances of every image that has objects, worst first."""
    rows = []
    for index in tqdm(range(len(data)), unit="image"):
        if data.records[index].annotations:
            found = model.segment(data.image(index))
            rows.append((f1_of(found, data, index, model.config.task), index, found))
    return sorted(rows, key=lambda row: row[0])


def named(
    model: LoadedModel, data: CocoDataset, names: Sequence[str]
) -> list[tuple[float, int, list[Detection]]]:
    """F1, index and instances of images by file name, in the order of the names.

    Raises:
        DatasetError: The split has no such image.
    """
    places = {record.file_name: index for index, record in enumerate(data.records)}
    rows = []
    for name in names:
        if name not in places:
            raise DatasetError(f"{data.annotation_file} has no image {name!r}")
        found = model.segment(data.image(places[name]))
        rows.append((f1_of(found, data, places[name], model.config.task), places[name], found))
    return rows


def build_parser() -> argparse.ArgumentParser:
    """The command line of training.pictures."""
    parser = argparse.ArgumentParser(prog="python -m training.pictures", description=__doc__)
    parser.add_argument("model", type=Path, help="model_repo/<model> folder")
    parser.add_argument("--data", type=Path, required=True, help="folder in COCO format")
    parser.add_argument("--split", default="val")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument(
        "--count", type=int, default=3, help="number of images of each of the three kinds (3)"
    )
    parser.add_argument(
        "--images", nargs="+", metavar="NAME", help="only these images, in one file chosen.png"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        data = CocoDataset(options.data, options.split)
        model = load_version(options.model)
        if options.images:
            chosen = {"chosen.png": named(model, data, options.images)}
        else:
            rows = rank(model, data)
            middle = max(0, len(rows) - options.count) // 2
            some = {
                "worst": rows[: options.count],
                "median": rows[middle : middle + options.count],
                "best": rows[::-1][: options.count],
            }
            chosen = {
                f"{kind}_{place}.png": [row]
                for kind, kind_rows in some.items()
                for place, row in enumerate(kind_rows, start=1)
            }
    except (DatasetError, ValueError, RuntimeError, OSError) as error:
        print(f"pictures: {error}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    task = model.config.task
    for name, rows in chosen.items():
        pictures = [
            side_by_side(data.image(index), found, _truth(data, index, task), task)
            for _, index, found in rows
        ]
        Image.fromarray(stack(pictures)).save(options.out / name, optimize=True)
        for f1, index, _ in rows:
            print(f"{name}: {data.records[index].file_name}, F1 {f1:.2f} at IoU {MATCH_IOU}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
