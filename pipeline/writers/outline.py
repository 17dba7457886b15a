"""Outlines in the shapes that the formats have."""

from __future__ import annotations

from pipeline.encode import decode_box
from pipeline.polygons import Ring, connect, simplify, trace_outlines, trace_parts
from pipeline.types import Detection


def outline_flat(instance: Detection, tolerance_px: float) -> list[list[int]]:
    """COCO polygons [x0, y0, x1, y1, ...]; holes are filled."""
    rings = trace_outlines(decode_box(instance), instance.bbox_xywh[:2])
    return [simplify(ring, tolerance_px).reshape(-1).tolist() for ring in rings]


def outline_parts(instance: Detection, tolerance_px: float) -> list[list[Ring]]:
    """Polygons of outer ring and holes."""
    parts = trace_parts(decode_box(instance), instance.bbox_xywh[:2])
    return [[simplify(ring, tolerance_px) for ring in part] for part in parts]


def outline_as_one(instance: Detection, tolerance_px: float) -> Ring:
    """One ring for all parts and holes."""
    parts = outline_parts(instance, tolerance_px)
    return connect([ring for part in parts for ring in part])


def outline_if_simple(instance: Detection, tolerance_px: float) -> Ring | None:
    """The ring of a mask that is one part without holes; None for any other."""
    parts = trace_parts(decode_box(instance), instance.bbox_xywh[:2])
    if len(parts) != 1 or len(parts[0]) != 1:
        return None
    return simplify(parts[0][0], tolerance_px)
