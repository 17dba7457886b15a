"""LabelMe: a JSON file for each image; masks of several parts or with holes are mask shapes."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from pipeline.encode import SCORE_DIGITS, decode_box
from pipeline.types import Detection
from pipeline.writers.outline import outline_if_simple
from pipeline.writers.page import Page, to_json


def encode(page: Page) -> bytes:
    """The file of a page; the image is expected beside it."""
    content: dict[str, Any] = {
        "version": "5.5.0",
        "flags": {},
        "shapes": [_describe(instance, page) for instance in page.instances],
        "imagePath": page.name.replace("\\", "/").rpartition("/")[2],
        "imageData": None,
        "imageHeight": page.image_hw[0],
        "imageWidth": page.image_hw[1],
    }
    return to_json(content)


def _describe(instance: Detection, page: Page) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "label": page.classes[instance.label].name,
        "score": round(instance.score, SCORE_DIGITS),
        "group_id": None,
        "description": "",
        "flags": {},
    }
    ring = outline_if_simple(instance, page.simplify_px)
    if ring is not None:
        points = ring.astype(float).tolist()
        return {**shape, "shape_type": "polygon", "points": points, "mask": None}
    x, y, width, height = (float(side) for side in instance.bbox_xywh)
    corners = [[x, y], [x + width - 1, y + height - 1]]
    buffer = io.BytesIO()
    Image.fromarray(decode_box(instance) > 0).save(buffer, "PNG")
    mask = base64.b64encode(buffer.getvalue()).decode()
    return {**shape, "shape_type": "mask", "points": corners, "mask": mask}
