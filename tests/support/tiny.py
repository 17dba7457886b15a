"""A network and data small enough to train in a test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.model_config import (
    ClassSpec,
    InputSpec,
    KeepRatioResize,
    MatrixNms,
    PostprocessSpec,
    TileResize,
)
from training.configs.schema import (
    AugmentConfig,
    BackboneConfig,
    Config,
    HeadConfig,
    NetworkConfig,
    ScheduleConfig,
    TargetConfig,
)

CANVAS = 64
CLASSES = (ClassSpec(category_id=3, name="disc"), ClassSpec(category_id=7, name="box"))
UInt8 = NDArray[np.uint8]

TINY = Config(
    name="tiny",
    model=NetworkConfig(
        backbone=BackboneConfig(depth=18, base_width=8, norm="bn", frozen_stages=0),
        neck_channels=16,
        head=HeadConfig(
            kind="decoupled_light",
            channels=16,
            num_convs=1,
            num_grids=(8, 4),
            level_strides=(8, 8),
            mask_strides=(4, 4),
            scale_ranges=((1, 24), (16, 2048)),
            coord_octaves=1,
            mask_kernel=1,
            norm_groups=4,
            mask_prior=0.1,
        ),
        candidates=20,
    ),
    targets=TargetConfig(mask_resize="area"),
    augment=AugmentConfig(scale_jitter=(0.8, 1.25), dihedral=True, brightness=0.1),
    schedule=ScheduleConfig(
        optimizer="adamw",
        schedule="cosine",
        lr=1e-3,
        batch_size=2,
        epochs=3,
        warmup_steps=2,
        clip_norm=5.0,
        ema_decay=0.9,
    ),
    input=InputSpec(resize=TileResize(scale=1.0, tile_hw=(CANVAS, CANVAS), overlap_px=16)),
    postprocess=PostprocessSpec(nms=MatrixNms()),
    num_classes=2,
    classes=CLASSES,
)
TINY_SGD = replace(
    TINY,
    name="tiny_sgd",
    model=replace(
        TINY.model,
        head=HeadConfig(
            kind="vanilla",
            channels=16,
            num_convs=1,
            num_grids=(8, 4),
            level_strides=(8, 8),
            mask_strides=(4, 4),
            scale_ranges=((1, 24), (16, 2048)),
            norm_groups=4,
        ),
    ),
    targets=TargetConfig(),
    schedule=ScheduleConfig(
        lr=0.01, batch_size=2, epochs=3, milestones=(2,), warmup_steps=1, ema_decay=0.0
    ),
    input=InputSpec(resize=KeepRatioResize(short_side=48, long_side=64)),
    augment=AugmentConfig(short_sides=(40, 48)),
)


def disc(height: int, width: int, y: float, x: float, radius: float) -> UInt8:
    """A filled circle, [height, width] uint8 0/1."""
    rows, columns = np.mgrid[:height, :width]
    return np.asarray((rows - y) ** 2 + (columns - x) ** 2 <= radius**2, np.uint8)


def rle_of(mask: UInt8) -> dict[str, Any]:
    """Compressed COCO RLE as JSON has it."""
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def annotation_of(mask: UInt8, image_id: int, category_id: int, **more: Any) -> dict[str, Any]:
    """A COCO annotation without its id."""
    x, y, w, h = cv2.boundingRect(mask)
    return {
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": rle_of(mask),
        "bbox": [x, y, w, h],
        "area": int(mask.sum()),
        "iscrowd": 0,
        **more,
    }


def write_split(
    root: Path,
    split: str,
    images: list[tuple[str, int, int]],
    annotations: list[dict[str, Any]],
) -> Path:
    """annotations/{split}.json; images are (file_name, height, width), ids count from 1."""
    content = {
        "images": [
            {"id": i, "file_name": name, "height": height, "width": width, "group": f"g{i % 2}"}
            for i, (name, height, width) in enumerate(images, 1)
        ],
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)],
        "categories": [{"id": c.category_id, "name": c.name} for c in reversed(CLASSES)],
    }
    path = root / "annotations" / f"{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_image(path: Path, image: UInt8) -> None:
    """PNG or JPEG of an RGB or grey image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)


def build_tiny_data(root: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Three images per split, the last one empty: bright discs and boxes on a dark ground."""
    for split in splits:
        images, annotations = [], []
        for index, (height, width) in enumerate([(64, 64), (60, 80), (64, 64)], 1):
            canvas = np.full((height, width, 3), 20, np.uint8)
            name = f"{split}{index}.png"
            if index < 3:
                masks = [disc(height, width, 20, 20, 10), np.zeros((height, width), np.uint8)]
                masks[1][36:56, 34 : 34 + 8 * index] = 1
                for mask, cls, colour in zip(masks, CLASSES, (200, 120), strict=True):
                    canvas[mask > 0] = colour
                    annotations.append(annotation_of(mask, index, cls.category_id))
            write_image(root / "images" / name, canvas)
            images.append((name, height, width))
        write_split(root, split, images, annotations)
    return root
