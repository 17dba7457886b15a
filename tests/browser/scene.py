"""A picture to segment, and what the server itself says of it."""

from __future__ import annotations

from typing import Any

import httpx

from tests.browser.demo import Demo
from tests.support.blob_model import draw_picture, encode_picture

BLACK = (0, 0, 0)
IN_RED, IN_GREEN, IN_HOLE, OUTSIDE = (0.2, 0.5), (0.65, 0.5), (0.775, 0.5), (0.5, 0.1)
"""Points of the picture as shares of its size; the hole is in the green box."""


def draw_scene() -> bytes:
    """80x40 px: a red box, and a darker green one with a hole."""
    picture = draw_picture(40, 80, {"red": (8, 8, 20, 24), "green": (48, 4, 28, 32)})
    picture[..., 1][picture[..., 1] > 0] = 180
    picture[12:28, 56:68] = 0
    return encode_picture(picture)


SCENE = draw_scene()


def ask(demo: Demo, data: bytes = SCENE, model: str = "wide") -> list[dict[str, Any]]:
    """The instances that the server answers to anyone."""
    response = httpx.post(f"{demo.url}/segment", params={"model": model}, content=data, timeout=60)
    instances: list[dict[str, Any]] = response.json()["results"][0]["instances"]
    return instances


def describe(instance: dict[str, Any], what: str = "area") -> str:
    """How the page says an instance."""
    score, area = instance["score"], instance["area"]
    return f"{instance['category']}, score {score:.2f}, {what} {area:,} px"


def count_segmentations(demo: Demo) -> int:
    """How often the page has asked for a segmentation."""
    return sum("/segment?" in url for url in demo.requests)
