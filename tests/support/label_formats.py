"""The same labelled pictures in every format that training reads."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image

from tests.support.tiny import UInt8, disc, rle_of, write_image

CLASS_NAMES = ("box", "disc")


@dataclass(frozen=True)
class Shape:
    """One object of a scene; without a mask it is its polygon."""

    label: int
    mask: UInt8 | None
    polygon: list[tuple[float, float]]


@dataclass(frozen=True)
class Scene:
    name: str
    image: UInt8
    shapes: list[Shape]

    @property
    def hw(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]


Writer = Callable[[Path, Sequence[Scene]], None]


def build_scenes(split: str = "train", *, masks: bool = True) -> list[Scene]:
    """Three pictures of two sizes, the last one without objects."""
    scenes = []
    for index, (height, width) in enumerate([(64, 64), (48, 80), (64, 64)], 1):
        image = np.full((height, width, 3), 20, np.uint8)
        shapes = []
        if index < 3:
            drawn = [np.zeros((height, width), np.uint8), disc(height, width, 16, 16, 9)]
            drawn[0][30:46, 34 : 34 + 8 * index] = 1
            right = 34.0 + 8 * index
            outlines = [
                [(34.0, 30.0), (right, 30.0), (right, 46.0), (34.0, 46.0)],
                [(16.0, 4.0), (27.5, 16.0), (16.0, 28.25), (4.0, 16.0)],
            ]
            for label, (mask, outline) in enumerate(zip(drawn, outlines, strict=True)):
                image[mask > 0] = (200, 120)[label]
                shapes.append(Shape(label, mask if masks else None, outline))
        scenes.append(Scene(f"{split}{index}", image, shapes))
    return scenes


def _write_images(folder: Path, scenes: Sequence[Scene], suffix: str = ".png") -> None:
    for scene in scenes:
        write_image(folder / (scene.name + suffix), scene.image)


def _flat(polygon: list[tuple[float, float]]) -> list[float]:
    return [value for point in polygon for value in point]


def write_coco(
    root: Path,
    scenes: Sequence[Scene],
    split: str = "train",
    classes: Sequence[str] = CLASS_NAMES,
) -> None:
    _write_images(root / "images", scenes)
    annotations = [
        {
            "id": 10 * number + index,
            "image_id": number,
            "category_id": shape.label + 1,
            "segmentation": [_flat(shape.polygon)] if shape.mask is None else rle_of(shape.mask),
            "iscrowd": 0,
        }
        for number, scene in enumerate(scenes, 1)
        for index, shape in enumerate(scene.shapes, 1)
    ]
    content = {
        "images": [
            {"id": n, "file_name": f"{s.name}.png", "height": s.hw[0], "width": s.hw[1]}
            for n, s in enumerate(scenes, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


def write_yolo(root: Path, scenes: Sequence[Scene], split: str = "train") -> None:
    _write_images(root / "images" / split, scenes)
    (root / "labels" / split).mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        height, width = scene.hw
        lines = [
            " ".join([str(s.label), *(f"{x / width!r} {y / height!r}" for x, y in s.polygon)])
            for s in scene.shapes
        ]
        (root / "labels" / split / f"{scene.name}.txt").write_text("\n".join(lines))
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASS_NAMES))
    splits = "train: images/train\nval: images/val\n"
    (root / "data.yaml").write_text(f"path: .\n{splits}names:\n{names}")
    (root / "images" / "val").mkdir(exist_ok=True)


def labelme_of(scene: Scene) -> dict[str, Any]:
    """The content of a LabelMe file."""
    shapes: list[dict[str, Any]] = []
    for shape in scene.shapes:
        item: dict[str, Any] = {"label": CLASS_NAMES[shape.label], "group_id": None, "flags": {}}
        if shape.mask is None:
            item |= {"shape_type": "polygon", "points": [list(p) for p in shape.polygon]}
        else:
            rows, columns = np.nonzero(shape.mask)
            top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
            file = io.BytesIO()
            Image.fromarray(shape.mask[top : bottom + 1, left : right + 1] > 0).save(file, "PNG")
            item |= {
                "shape_type": "mask",
                "points": [[float(left), float(top)], [float(right), float(bottom)]],
                "mask": base64.b64encode(file.getvalue()).decode(),
            }
        shapes.append(item)
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"{scene.name}.png",
        "imageData": None,
        "imageHeight": scene.hw[0],
        "imageWidth": scene.hw[1],
    }


def write_labelme(root: Path, scenes: Sequence[Scene], split: str = "train") -> None:
    _write_images(root / split, scenes)
    for scene in scenes:
        (root / split / f"{scene.name}.json").write_text(json.dumps(labelme_of(scene)))


def _cvat_shape(shape: Shape) -> str:
    label = quoteattr(CLASS_NAMES[shape.label])
    if shape.mask is None:
        points = ";".join(f"{x!r},{y!r}" for x, y in shape.polygon)
        return f'<polygon label={label} points="{points}" z_order="0"/>'
    rows, columns = np.nonzero(shape.mask)
    top, left = rows.min(), columns.min()
    crop = shape.mask[top : rows.max() + 1, left : columns.max() + 1]
    runs = [(value, len(list(run))) for value, run in groupby(crop.ravel().tolist())]
    counts = ([] if runs[0][0] == 0 else [0]) + [length for _, length in runs]
    return (
        f'<mask label={label} rle="{", ".join(map(str, counts))}" left="{left}" top="{top}" '
        f'width="{crop.shape[1]}" height="{crop.shape[0]}"/>'
    )


def write_cvat(root: Path, scenes: Sequence[Scene], split: str = "train") -> None:
    _write_images(root / "images", scenes)
    labels = "".join(f"<label><name>{name}</name></label>" for name in CLASS_NAMES)
    images = "".join(
        f'<image id="{i}" name="{s.name}.png" subset="{split}" width="{s.hw[1]}" '
        f'height="{s.hw[0]}">' + "".join(map(_cvat_shape, s.shapes)) + "</image>"
        for i, s in enumerate(scenes)
    )
    (root / "annotations.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>'
        f"<meta><task><labels>{labels}</labels></task></meta>{images}</annotations>"
    )


def _masks_of(scene: Scene) -> tuple[UInt8, UInt8]:
    """Number of the object and class from 1 of each pixel."""
    numbers, kinds = np.zeros(scene.hw, np.uint8), np.zeros(scene.hw, np.uint8)
    for number, shape in enumerate(scene.shapes, 1):
        assert shape.mask is not None
        numbers[shape.mask > 0], kinds[shape.mask > 0] = number, shape.label + 1
    return numbers, kinds


def write_voc(root: Path, scenes: Sequence[Scene], split: str = "train") -> None:
    _write_images(root / "JPEGImages", scenes)
    for scene in scenes:
        for folder, pixels in zip(
            ("SegmentationObject", "SegmentationClass"), _masks_of(scene), strict=True
        ):
            pixels[:1] = 255  # the border around objects is not an object
            image = Image.fromarray(pixels)
            image.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
            (root / folder).mkdir(parents=True, exist_ok=True)
            image.save(root / folder / f"{scene.name}.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("".join(f"{scene.name}\n" for scene in scenes))
    (root / "labelmap.txt").write_text("background:0,0,0::\nbox:128,0,0::\ndisc:0,128,0::\n")


def write_label_images(root: Path, scenes: Sequence[Scene], split: str = "train") -> None:
    """16-bit PNG; every second one TIFF."""
    _write_images(root / split / "images", scenes)
    for index, scene in enumerate(scenes):
        pixels = _masks_of(scene)[0].astype(np.uint16) * 300
        (root / split / "masks").mkdir(parents=True, exist_ok=True)
        suffix = (".png", ".tif")[index % 2]
        Image.fromarray(pixels).save(root / split / "masks" / f"{scene.name}{suffix}")


def write_instance_files(root: Path, scenes: Sequence[Scene], split: str = "train") -> None:
    """One file per object; an empty picture has one empty file."""
    for scene in scenes:
        folder = root / split / scene.name
        write_image(folder / "images" / f"{scene.name}.png", scene.image)
        empty = Shape(0, np.zeros(scene.hw, np.uint8), [])
        for index, shape in enumerate(scene.shapes or [empty]):
            assert shape.mask is not None
            pixels = np.where(shape.mask > 0, 255, 0).astype(np.uint8)
            write_image(folder / "masks" / f"{index:04}.png", pixels)
