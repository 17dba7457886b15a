"""A drawn street with houses, for the bundled model `facades`; no photograph is needed.

    python -m tests.support.street service/http/web/samples/street.jpg

draws the sample of the demo page. Coordinates are those of a picture of 1280 px, which is drawn,
put into perspective, blurred and halved.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

UInt8 = NDArray[np.uint8]
Float = NDArray[np.float32]
Colour = tuple[float, float, float]

SIDE = 1280
GROUND = 1100
SHOP_HEIGHT = 190
SKY = np.array([[150, 185, 225], [215, 225, 235]], np.float32)
CORNERS = np.array([[0, 0], [SIDE, 0], [SIDE, SIDE], [0, SIDE]], np.float32)
SEEN_CORNERS = np.array([[-40, -30], [1290, 20], [1320, 1290], [-20, 1300]], np.float32)


class House(NamedTuple):
    """Left, right and upper edge of a house, its colour, and its rows of windows."""

    left: int
    right: int
    top: int
    wall: Colour
    rows: int
    balconies: tuple[int, ...] = ()
    shop: bool = False


HOUSES = (
    House(-60, 455, 170, (178, 120, 92), 4),
    House(455, 905, 90, (214, 196, 158), 4, balconies=(1, 2), shop=True),
    House(905, 1400, 250, (150, 158, 150), 3),
)


class Street(NamedTuple):
    """The picture [640, 640, 3] and the windows' boxes [N, 4]: x, y, width, height, px."""

    picture: UInt8
    windows: Float


class _Canvas:
    """Draws in place; the same numbers for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        rise = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None, None]
        self.pixels: Float = np.repeat(SKY[0] * (1 - rise) + SKY[1] * rise, SIDE, axis=1)
        self.windows: list[tuple[float, float, float, float]] = []

    def fill(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        corners = (int(x0), int(y0)), (int(x1) - 1, int(y1) - 1)
        cv2.rectangle(self.pixels, *corners, colour, cv2.FILLED)

    def roughen(self, box: tuple[int, int, int, int], amount: float, size: int) -> None:
        """Adds noise whose grains have this size, px."""
        x0, y0, x1, y1 = box
        grains = max(2, (y1 - y0) // size), max(2, (x1 - x0) // size)
        noise = self.random.normal(0, amount, grains).astype(np.float32)
        grown = cv2.resize(noise, (x1 - x0, y1 - y0), interpolation=cv2.INTER_CUBIC)
        self.pixels[y0:y1, x0:x1] += np.asarray(grown)[..., None]

    def polygon(self, points: Sequence[tuple[float, float]], colour: Colour) -> None:
        cv2.fillPoly(self.pixels, [np.array(points, np.int32)], colour)


def _darker(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _draw_window(canvas: _Canvas, x: float, y: float, w: float, h: float, wall: Colour) -> None:
    canvas.fill(x - 6, y - 8, x + w + 6, y + h + 8, _darker(wall, 0.9))
    canvas.fill(x - 10, y + h + 6, x + w + 10, y + h + 14, _darker(wall, 0.75))
    canvas.fill(x, y, x + w, y + h, _darker((52, 60, 70), canvas.random.uniform(0.8, 1.2)))
    if canvas.random.random() < 0.5:
        for left, right in ((0, 0.3), (0.75, 1)):
            canvas.fill(x + left * w, y, x + right * w, y + h, (205, 200, 190))
    for bar in (x, x + w / 2, x + w):
        canvas.fill(bar - 3, y, bar + 3, y + h, (235, 232, 226))
    for bar in (y, y + h * 0.35, y + h):
        canvas.fill(x, bar - 3, x + w, bar + 3, (235, 232, 226))
    canvas.windows.append((x, y, w, h))


def _draw_balcony(canvas: _Canvas, x: float, y: float, w: float, h: float) -> None:
    rail, floor = y + h * 0.62, y + h + 8
    canvas.fill(x - 26, floor, x + w + 26, floor + 14, (120, 118, 112))
    canvas.fill(x - 24, rail, x + w + 24, rail + 5, (28, 28, 30))
    for bar in np.arange(x - 24, x + w + 25, 11):
        canvas.fill(bar, rail, bar + 4, floor + 2, (28, 28, 30))


def _draw_house(canvas: _Canvas, house: House) -> None:
    left, right, upper = max(0, house.left), min(SIDE, house.right), house.top
    canvas.fill(left, upper, right, GROUND, house.wall)
    for amount, size in ((7, 3), (8, 60)):
        canvas.roughen((left, upper, right, GROUND), amount, size)
    canvas.fill(left, upper - 24, right, upper, (95, 70, 62))
    canvas.fill(left, upper, right, upper + 16, _darker(house.wall, 0.7))
    canvas.fill(right - 6, upper, right, GROUND, _darker(house.wall, 0.55))
    shop = GROUND - SHOP_HEIGHT
    cell_w, cell_h = (house.right - house.left) / 3, (shop - upper - 20) / house.rows
    w, h = cell_w * 0.42, cell_h * 0.58
    for row in range(house.rows):
        for column in range(3):
            x = house.left + column * cell_w + (cell_w - w) / 2
            y = upper + 40 + row * cell_h
            if x < 6 or x + w > SIDE - 6:
                continue
            _draw_window(canvas, x, y, w, h, house.wall)
            if row in house.balconies:
                _draw_balcony(canvas, x, y, w, h)
    canvas.fill(left, shop - 10, right, shop, _darker(house.wall, 0.6))
    if house.shop:
        _draw_shop(canvas, house, shop)
    else:
        _draw_window(canvas, left + 40, shop + 34, 100, 104, house.wall)
        _draw_door(canvas, left + 230, shop + 34, house.wall)


def _draw_door(canvas: _Canvas, x: float, y: float, wall: Colour) -> None:
    canvas.fill(x - 8, y - 8, x + 98, GROUND, _darker(wall, 0.6))
    canvas.fill(x, y, x + 90, GROUND, (70, 48, 40))
    canvas.fill(x + 14, y + 12, x + 76, y + 58, (90, 96, 100))


def _draw_shop(canvas: _Canvas, house: House, y: int) -> None:
    x = house.left
    canvas.fill(x + 20, y, house.right - 20, y + 46, (120, 30, 36))
    letters = np.zeros((SIDE, SIDE), np.uint8)
    cv2.putText(letters, "CAFE", (x + 140, y + 38), cv2.FONT_HERSHEY_DUPLEX, 1.3, 255, 3)
    canvas.pixels[letters > 127] = (240, 230, 210)
    canvas.fill(x + 30, y + 50, x + 270, GROUND - 16, (70, 66, 60))
    canvas.fill(x + 40, y + 58, x + 262, GROUND - 30, (120, 112, 96))
    canvas.roughen((x + 40, y + 58, x + 262, GROUND - 30), 28, 18)
    canvas.fill(x + 300, y + 50, x + 400, GROUND, (52, 34, 28))
    canvas.fill(x + 312, y + 62, x + 388, GROUND - 60, (96, 100, 102))


def _draw_road(canvas: _Canvas) -> None:
    canvas.fill(0, GROUND, SIDE, GROUND + 34, (160, 158, 154))
    canvas.roughen((0, GROUND, SIDE, GROUND + 34), 6, 4)
    canvas.fill(0, GROUND + 34, SIDE, SIDE, (88, 88, 92))
    canvas.roughen((0, GROUND + 34, SIDE, SIDE), 8, 3)
    canvas.fill(0, GROUND + 30, SIDE, GROUND + 36, (120, 118, 116))


def _draw_tree(canvas: _Canvas, x: int, y: int) -> None:
    canvas.fill(x - 14, y, x + 14, GROUND + 10, (74, 58, 46))
    for _ in range(420):
        angle, reach = canvas.random.uniform(0, 2 * np.pi), 175 * canvas.random.random() ** 0.5
        centre = int(x + reach * np.cos(angle)), int(y - 90 + 0.9 * reach * np.sin(angle))
        colour = _darker((62, 98, 48), canvas.random.uniform(0.55, 1.15))
        radius = int(canvas.random.uniform(12, 30))
        cv2.circle(canvas.pixels, centre, radius, colour, cv2.FILLED)


def _draw_car(canvas: _Canvas, x: int, y: int) -> None:
    cv2.ellipse(canvas.pixels, (x + 180, y + 34), (210, 16), 0, 0, 360, (52, 52, 55), cv2.FILLED)
    outline = [(0, 0), (10, -52), (80, -64), (130, -118), (270, -118), (322, -62), (380, -48)]
    body = [(x + dx, y + dy) for dx, dy in (*outline, (384, 14), (0, 14))]
    canvas.polygon(body, (40, 66, 118))
    for low0, high0, high1, low1 in ((96, 134, 190, 190), (204, 204, 266, 306)):
        glass = [(x + low0, y - 62), (x + high0, y - 108), (x + high1, y - 108), (x + low1, y - 62)]
        canvas.polygon(glass, (60, 72, 84))
    for wheel in (80, 304):
        for radius, grey in ((36, 22), (19, 150)):
            centre = (x + wheel, y + 16)
            cv2.circle(canvas.pixels, centre, radius, (grey, grey, grey + 3), cv2.FILLED)
    canvas.fill(x + 366, y - 34, x + 384, y - 18, (235, 228, 200))


def draw_street(seed: int = 4) -> Street:
    """A street of three houses with a shop, a tree and a car."""
    canvas = _Canvas(seed)
    for house in HOUSES:
        _draw_house(canvas, house)
    _draw_road(canvas)
    _draw_tree(canvas, 1024, 768)
    _draw_car(canvas, 154, GROUND + 86)
    shade = np.linspace(1.08, 0.82, SIDE, dtype=np.float32)[None, :, None]
    view = cv2.getPerspectiveTransform(CORNERS, SEEN_CORNERS)
    seen = cv2.warpPerspective(
        canvas.pixels * shade, view, (SIDE, SIDE), borderMode=cv2.BORDER_REPLICATE
    )
    sharp = cv2.GaussianBlur(seen, (0, 0), 1.4)
    half = np.asarray(cv2.resize(sharp, (SIDE // 2, SIDE // 2), interpolation=cv2.INTER_AREA))
    noise = canvas.random.normal(0, 3.5, half.shape)
    picture = (half + noise).clip(0, 255).astype(np.uint8)
    boxes = [_see(box, view) for box in canvas.windows]
    return Street(picture, np.array(boxes, np.float32))


def _see(box: tuple[float, float, float, float], view: NDArray[Any]) -> list[float]:
    """The box of a rectangle in the picture."""
    x, y, w, h = box
    corners = np.array([[[x, y], [x + w, y], [x + w, y + h], [x, y + h]]], np.float32)
    points: NDArray[Any] = np.asarray(cv2.perspectiveTransform(corners, view)).reshape(4, 2) / 2
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    return [x0, y0, x1 - x0, y1 - y0]


if __name__ == "__main__":
    Image.fromarray(draw_street().picture).save(sys.argv[1], quality=85)
