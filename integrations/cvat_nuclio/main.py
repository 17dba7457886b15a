"""CVAT's serverless function (nuclio): asks a running solo-serve; see function.yaml."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

from solo_client import Client, Instance


def init_context(context: Any) -> None:
    """Connects to the server that SOLO_URL names."""
    key = os.environ.get("SOLO_API_KEY") or None
    context.user_data.client = Client(os.environ["SOLO_URL"], api_key=key)
    context.logger.info(f"solo-serve at {os.environ['SOLO_URL']}")


def handler(context: Any, event: Any) -> Any:
    """The masks of the image in a request {"image": base64, "threshold": 0..1}."""
    body = event.body if isinstance(event.body, dict) else json.loads(event.body)
    options: dict[str, Any] = {
        "model": os.environ.get("SOLO_MODEL") or None,
        "score_threshold": body.get("threshold"),
    }
    found = context.user_data.client.segment(base64.b64decode(body["image"]), **options)
    shapes = [describe(instance) for instance in found.instances]
    return context.Response(
        body=json.dumps(shapes), headers={}, content_type="application/json", status_code=200
    )


def describe(instance: Instance) -> dict[str, Any]:
    """An instance as CVAT expects it: the pixels of its box, row by row, then the box."""
    x, y, width, height = (int(side) for side in instance.bbox_xywh)
    box = [x, y, x + width - 1, y + height - 1]
    pixels = instance.mask[y : y + height, x : x + width].astype(int).ravel().tolist()
    return {
        "confidence": str(instance.score),
        "label": instance.category,
        "type": "mask",
        "points": box,
        "mask": pixels + box,
    }
