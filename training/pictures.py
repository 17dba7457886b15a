"""python -m training.pictures: a model's best and worst images beside their ground truth."""

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

from service.pipeline.draw import draw_instances
from service.pipeline.types import Instance, UInt8
from service.registry import LoadedModel, load_version
from training.data.coco import CocoDataset, DatasetError

MATCH_IOU = 0.5
GAP_PX = 6


def match_f1(found: Sequence[dict[str, Any]], truth: Sequence[dict[str, Any]]) -> float:
    """F1 of masks matched one to one at IoU 0.5, best score first; 1 if both are empty."""
    if not found or not truth:
        return float(not found and not truth)
    iou = np.asarray(coco_mask.iou(list(found), list(truth), [0] * len(truth)))
    matched = 0
    for row in iou:
        best = int(row.argmax())
        if row[best] >= MATCH_IOU:
            matched += 1
            iou[:, best] = 0
    return 2 * matched / (len(found) + len(truth))


def _truth(data: CocoDataset, index: int) -> list[Instance]:
    instances = []
    for a in data.records[index].annotations:
        x, y, w, h = (int(v) for v in a.box_xywh)
        instances.append(Instance(a.label, 1.0, a.rle, (x, y, w, h), w * h))
    return instances


def side_by_side(image: UInt8, found: Sequence[Instance], truth: Sequence[Instance]) -> UInt8:
    """The image, the masks found and the ground truth, left to right at 2x."""
    parts = [image, draw_instances(image, found), draw_instances(image, truth)]
    size = (image.shape[1] * 2, image.shape[0] * 2)
    large = [cv2.resize(p, size, interpolation=cv2.INTER_NEAREST) for p in parts]
    gap = np.full((size[1], GAP_PX, 3), 255, np.uint8)
    return np.hstack([large[0], gap, large[1], gap, large[2]]).astype(np.uint8)


def rank(model: LoadedModel, data: CocoDataset) -> list[tuple[float, int, list[Instance]]]:
    """F1, index and instances of every image that has objects, worst first."""
    rows = []
    for index in tqdm(range(len(data)), unit="image"):
        truth = [a.rle for a in data.records[index].annotations]
        if truth:
            found = model.segment(data.image(index))
            rows.append((match_f1([i.rle for i in found], truth), index, found))
    return sorted(rows, key=lambda row: row[0])


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.pictures", description=__doc__)
    parser.add_argument("model", type=Path, help="model_repo/<model> folder")
    parser.add_argument("--data", type=Path, required=True, help="folder in COCO format")
    parser.add_argument("--split", default="val")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--count", type=int, default=3, help="pictures of each kind (3)")
    options = parser.parse_args(arguments)
    try:
        data = CocoDataset(options.data, options.split)
        rows = rank(load_version(options.model), data)
    except (DatasetError, ValueError, RuntimeError, OSError) as error:
        print(f"pictures: {error}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = {"worst": rows[: options.count], "best": rows[::-1][: options.count]}
    for kind, some in chosen.items():
        for place, (f1, index, found) in enumerate(some, start=1):
            name = f"{kind}_{place}.png"
            picture = side_by_side(data.image(index), found, _truth(data, index))
            Image.fromarray(picture).save(options.out / name)
            print(f"{name}: {data.records[index].file_name}, F1 {f1:.2f} at IoU {MATCH_IOU}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
