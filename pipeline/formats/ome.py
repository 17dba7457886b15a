"""OME-XML, the description in an OME-TIFF: bounds, names of channels, size of a pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.etree import ElementTree

from pipeline.errors import CorruptImage

MAX_COUNT = 1 << 16
"""Of anything that the description counts; tifffile makes a list as long as it says."""
_COUNTS = ("SizeC", "SizeZ", "SizeT", "NumPlanes", "PlaneCount", "IFD", "SamplesPerPixel")
_FIRST = "First"
_MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_MICROMETRES |= {"Å": 1e-4, "in": 25400.0}


@dataclass(frozen=True)
class OmeImage:
    """What is known of the first image.

    Attributes:
        channels: Names; empty if one of the channels has none.
        um_per_px: Size of a pixel along x and y, micrometres, where stated.
    """

    channels: tuple[str, ...]
    um_per_px: tuple[float | None, float | None]


def read_ome(text: str) -> OmeImage:
    """Reads the description, and checks the numbers that tifffile relies on.

    Raises:
        CorruptImage: It is not XML, declares entities, or counts more than `MAX_COUNT`.
    """
    if "<!" in text.replace("<!--", ""):
        raise CorruptImage("the OME-XML has a document type, which is not read")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise CorruptImage(f"the OME-XML is damaged: {error}") from error
    for element in root.iter():
        _check(element)
    pixels = next((e for e in root.iter() if _name(e) == "Pixels"), None)
    if pixels is None:
        return OmeImage((), (None, None))
    names = [e.get("Name", "") for e in pixels if _name(e) == "Channel"]
    sizes = (_read_size(pixels, "X"), _read_size(pixels, "Y"))
    return OmeImage(tuple(names) if all(names) else (), sizes)


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _check(element: ElementTree.Element) -> None:
    counts = {
        name: _read_number(element, name)
        for name in element.attrib
        if name in _COUNTS or name.startswith(_FIRST)
    }
    if _name(element).startswith("Along") and "Start" in element.attrib:
        start, end = (_read_number(element, name) for name in ("Start", "End"))
        counts["End"] = abs(end - start) / (abs(_read_number(element, "Step")) or 1)
    counts["planes"] = math.prod(counts.get(f"Size{axis}", 1) for axis in "CZT")
    for name, count in counts.items():
        if not count <= MAX_COUNT:
            raise CorruptImage(
                f"the OME-XML's {_name(element)} has {name} {count:g}, more than {MAX_COUNT}"
            )


def _read_number(element: ElementTree.Element, name: str) -> float:
    text = element.get(name, "1")
    try:
        return abs(float(text))
    except ValueError as error:
        raise CorruptImage(f"the OME-XML's {_name(element)} has {name}={text!r}") from error


def _read_size(pixels: ElementTree.Element, axis: str) -> float | None:
    unit = _MICROMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
    try:
        return None if unit is None else float(pixels.get(f"PhysicalSize{axis}", "")) * unit
    except ValueError:
        return None
