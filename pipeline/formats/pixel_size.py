"""The size of a TIFF's pixels, where the file states it in a way that can be trusted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_IMAGEJ_UNITS = {"micron": 1.0, "microns": 1.0, "um": 1.0, "µm": 1.0, "μm": 1.0, "\\u00b5m": 1.0}
_IMAGEJ_UNITS |= {"nm": 1e-3, "mm": 1e3, "cm": 1e4, "inch": 25400.0}
_TAG_UNITS = {2: 25400.0, 3: 10000.0}
"""TIFF's ResolutionUnit: inch and centimetre."""
_LARGEST_TAG_UM = 10.0
"""Resolution tags of larger pixels are those of printers and scanners."""
_SMALLEST_UM, _LARGEST_UM = 1e-5, 1e5
_MOST_SKEW = 0.01
_APERIO = re.compile(r"\bMPP *= *([0-9.]+)")


def combine(x_um: float | None, y_um: float | None) -> float | None:
    """The size of a square pixel; None if the sides are not known, not sizes, or differ."""
    if x_um is None or y_um is None:
        return None
    if not all(math.isfinite(v) and _SMALLEST_UM <= v <= _LARGEST_UM for v in (x_um, y_um)):
        return None
    if abs(x_um - y_um) > _MOST_SKEW * max(x_um, y_um):
        return None
    return (x_um + y_um) / 2


def read_aperio(description: str) -> float | None:
    """Micrometres per pixel in the description of a slide from Aperio."""
    found = _APERIO.search(description)
    try:
        size = None if found is None else float(found[1])
    except ValueError:
        return None
    return combine(size, size)


def read_resolution(page: Any, imagej: Mapping[str, Any] | None) -> float | None:
    """Micrometres per pixel by the resolution tags of a tifffile page.

    Args:
        page: The page.
        imagej: ImageJ's metadata, whose unit counts in place of the tag's.
    """
    if imagej is not None:
        unit = _IMAGEJ_UNITS.get(str(imagej.get("unit", "")).lower())
        largest = _LARGEST_UM
    else:
        unit = _TAG_UNITS.get(int(page.tags.valueof(296, default=2) or 0))
        largest = _LARGEST_TAG_UM
    if unit is None:
        return None
    sides = [_read_side(page.tags.valueof(code), unit) for code in (282, 283)]
    size = combine(*sides)
    return None if size is None or size > largest else size


def _read_side(value: Any, unit: float) -> float | None:
    """A side of a pixel by a rational number of pixels per unit."""
    try:
        pixels, units = map(float, value)
        return unit * units / pixels
    except (TypeError, ValueError, ZeroDivisionError):
        return None
