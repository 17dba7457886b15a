"""GeoJSON with the object fields of QuPath: a feature for each instance, in pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.draw import instance_colour
from pipeline.encode import SCORE_DIGITS
from pipeline.polygons import Ring
from pipeline.types import Detection
from pipeline.writers.outline import outline_parts
from pipeline.writers.page import Page, to_json


def encode(page: Page) -> bytes:
    """The file of a page; valid by OGC's rules unless it is simplified."""
    features = b",\n".join(to_json(_describe(i, page)) for i in page.instances)
    return b'{"type": "FeatureCollection", "features": [\n' + features + b"\n]}\n"


def _describe(instance: Detection, page: Page) -> dict[str, Any]:
    parts = [[_close(ring) for ring in part] for part in outline_parts(instance, page.simplify_px)]
    geometry: dict[str, Any] = {"type": "MultiPolygon", "coordinates": parts}
    if len(parts) == 1:
        geometry = {"type": "Polygon", "coordinates": parts[0]}
    measurements = {"Score": round(instance.score, SCORE_DIGITS), "Area px^2": instance.area}
    if page.um_per_px is not None:
        measurements["Area µm^2"] = round(instance.area * page.um_per_px**2, SCORE_DIGITS)
    return {
        "type": "Feature",
        "geometry": geometry,
        "properties": {
            "objectType": "detection",
            "classification": {
                "name": page.classes[instance.label].name,
                "color": list(instance_colour(instance.label)),
            },
            "measurements": measurements,
        },
    }


def _close(ring: Ring) -> list[list[int]]:
    closed: list[list[int]] = np.concatenate([ring, ring[:1]]).tolist()
    return closed
