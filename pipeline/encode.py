"""Instances as COCO results: masks as RLE, polygons or an index PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.model_config import ModelConfig
from pipeline.polygons import trace_outlines
from pipeline.runs import read_counts
from pipeline.types import Detection, UInt8, Window

SCORE_DIGITS = 6


def decode_box(instance: Detection) -> UInt8:
    """The mask's pixels inside its box: [h, w] uint8 0/1, without building the full mask."""
    x, y, width, height = instance.bbox_xywh
    return decode_window(instance, Window(y, x, height, width))


def decode_window(instance: Detection, window: Window) -> UInt8:
    """The mask's pixels inside a window of the image: [h, w] uint8 0/1."""
    height, width = instance.rle["size"]
    edges = np.cumsum(read_counts(instance.rle["counts"], height * width))
    column, row = np.divmod(edges, height)
    # Number of the window's pixels before each edge, in column-major order.
    before = (column - window.x) * window.height + np.clip(row - window.y, 0, window.height)
    before = np.clip(before, 0, window.width * window.height)
    lengths = np.diff(np.concatenate([[0], before, [window.width * window.height]]))
    values = np.arange(len(lengths), dtype=np.uint8) & 1
    return np.ascontiguousarray(np.repeat(values, lengths).reshape(window.width, window.height).T)


def encode_polygons(instance: Detection) -> list[list[float]]:
    """Outlines as COCO polygons, one flat [x0, y0, x1, y1, ...] per connected component.

    Vertices are pixel corners, so pycocotools rasterises them to the same mask; only holes are
    lost, because COCO polygons cannot represent them.
    """
    rings = trace_outlines(decode_box(instance), instance.bbox_xywh[:2])
    return [ring.reshape(-1).astype(float).tolist() for ring in rings]


def count_holes(instance: Detection) -> int:
    """Number of holes in the mask; `encode_polygons` fills them."""
    outside = np.pad(1 - decode_box(instance), 1, constant_values=1)
    labels, _ = cv2.connectedComponents(outside, connectivity=4)
    return labels - 2  # without the labels of the mask and of its surroundings


def encode_index_png(instances: Sequence[Detection], image_hw: tuple[int, int]) -> bytes:
    """All masks as one greyscale PNG: pixel value n is the n-th instance (from 1), 0 background.

    Where masks overlap, the earlier instance wins.

    Args:
        instances: Best first; more than 255 give a 16-bit PNG.
        image_hw: Height and width of the image.

    Raises:
        ValueError: There are more than 65535 instances.
    """
    if len(instances) > np.iinfo(np.uint16).max:
        raise ValueError(f"{len(instances)} instances do not fit a 16-bit image")
    index = np.zeros(image_hw, np.uint8 if len(instances) < 256 else np.uint16)
    for number in range(len(instances), 0, -1):
        instance = instances[number - 1]
        x, y, width, height = instance.bbox_xywh
        index[y : y + height, x : x + width][decode_box(instance) > 0] = number
    return encode_png(index)


def encode_png(pixels: UInt8 | NDArray[np.uint16]) -> bytes:
    """An array [H, W] or [H, W, 3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def encode_rle(instance: Detection) -> dict[str, Any]:
    """COCO compressed RLE with `counts` as text, for JSON."""
    return {"size": list(instance.rle["size"]), "counts": instance.rle["counts"].decode("ascii")}


def instance_from_coco(result: Mapping[str, Any], label: int) -> Detection:
    """An instance of a COCO result with run lengths, as `instance_to_coco` gives it."""
    rle = result["segmentation"]
    x, y, width, height = (int(side) for side in result["bbox"])
    return Detection(
        label=label,
        score=result["score"],
        rle={"size": list(rle["size"]), "counts": rle["counts"].encode("ascii")},
        bbox_xywh=(x, y, width, height),
        area=result["area"],
    )


def instance_to_coco(
    instance: Detection,
    config: ModelConfig,
    *,
    masks: Literal["rle", "polygon", "png", "none"] = "rle",
) -> dict[str, Any]:
    """An instance as a COCO result without `image_id`.

    Args:
        instance: The instance.
        config: Its model, for the class names.
        masks: Format of `segmentation`; omitted for `none`, and for `png`, which is one per image
            (`encode_index_png`).
    """
    category = config.classes[instance.label]
    result: dict[str, Any] = {
        "category_id": category.category_id,
        "category": category.name,
        "score": round(instance.score, SCORE_DIGITS),
        "bbox": list(instance.bbox_xywh),
        "area": instance.area,
    }
    if masks == "rle":
        result["segmentation"] = encode_rle(instance)
    elif masks == "polygon":
        result["segmentation"] = encode_polygons(instance)
        result["holes"] = count_holes(instance)
    return result
