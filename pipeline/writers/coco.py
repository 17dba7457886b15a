"""COCO JSON: a data set of images, annotations and categories, with scores.

A page's part has a line for the image and one for each annotation, without ids and the opening
brace, which `join` puts before them. The images are written last, so nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.encode import SCORE_DIGITS, count_holes, encode_rle
from pipeline.types import Detection
from pipeline.writers.outline import outline_flat
from pipeline.writers.page import Classes, Page, to_json


def encode_rles(page: Page) -> bytes:
    """A page with masks as run lengths."""
    return _encode(page, polygons=False)


def encode_polygons(page: Page) -> bytes:
    """A page with masks as polygons, but for masks with holes, which stay run lengths."""
    return _encode(page, polygons=True)


def _encode(page: Page, *, polygons: bool) -> bytes:
    height, width = page.image_hw
    lines: list[dict[str, Any]] = [{"file_name": page.name, "height": height, "width": width}]
    for instance in page.instances:
        exact = not polygons or count_holes(instance)
        lines.append(_annotate(instance, page, encode_rle(instance) if exact else None))
    return b"\n".join(to_json(line)[1:] for line in lines)


def _annotate(instance: Detection, page: Page, rle: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "category_id": page.classes[instance.label].category_id,
        "bbox": list(instance.bbox_xywh),
        "area": instance.area,
        "iscrowd": 0,
        "score": round(instance.score, SCORE_DIGITS),
        "segmentation": outline_flat(instance, page.simplify_px) if rle is None else rle,
    }


def join(classes: Classes, pages: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    """The data set, page by page."""
    images: list[bytes] = []
    count = 0
    yield b'{"info": {"description": "found by solo-serve"},\n"annotations": ['
    for image_id, part in pages:
        image, *annotations = part.split(b"\n")
        images.append(b'{"id": %d, %b' % (image_id, image))
        for annotation in annotations:
            count += 1
            ids = b'{"id": %d, "image_id": %d, ' % (count, image_id)
            yield (b",\n" if count > 1 else b"\n") + ids + annotation
    categories = [{"id": c.category_id, "name": c.name} for c in classes]
    yield b'],\n"images": [' + b",\n".join(images)
    yield b'],\n"categories": ' + to_json(categories) + b"}\n"
